"""Random JSON schemas of everything that structured output supports."""

import random
from typing import Any

FORMATS = ("date", "uuid", "ipv4", "ipv6", "email")  # that jsonschema checks too
PATTERNS = ("^[a-c]{1,4}$", "^\\d{2}-[xyz]+$", "^(yes|no|é)$")


class SchemaMaker:
    """`make` a schema; the same for the same seed. Finite, but for references, so that a random model ends it."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(f"schema {seed}")
        self.defs: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        schema = self.one(3)
        return {**schema, "$defs": self.defs} if self.defs else schema

    def one(self, depth: int) -> dict[str, Any]:
        simple = [self.string, self.integer, self.number, self.literal, self.types]
        nested = [self.object, self.object, self.array, self.tuple, self.union, self.reference, self.joined, self.map]
        schema = self.dice.choice(nested if depth == 3 else simple + (nested if depth else []))(depth)
        if self.dice.random() < 0.2:
            schema |= {"title": "t", "description": "about", "x-order": 1}
        return schema

    def string(self, depth: int = 0) -> dict[str, Any]:
        low = self.dice.randint(0, 3)
        kinds = (
            {"minLength": low, "maxLength": low + self.dice.randint(0, 5)},
            {"pattern": self.dice.choice(PATTERNS), "maxLength": 6},
            {"format": self.dice.choice(FORMATS)},
        )
        return {"type": "string", **self.dice.choice(kinds)}

    def integer(self, depth: int = 0) -> dict[str, Any]:
        low = self.dice.randint(-120, 120)
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + self.dice.randint(0, 300)}
        if self.dice.random() < 0.3 and schema["maximum"] - low > 14:
            schema["multipleOf"] = self.dice.choice((2, 5, 7))
        if self.dice.random() < 0.2 and schema["maximum"] - low > 20:
            schema["exclusiveMinimum"] = schema.pop("minimum")
        return schema

    def number(self, depth: int = 0) -> dict[str, Any]:
        low = self.dice.randint(-20, 20) / 4
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self.dice.choice((1, 1.5, 30))}

    def literal(self, depth: int = 0) -> dict[str, Any]:
        values = [None, True, 3, -1.5, "a", 'q"\\\n', "日本", [1, "x"], {"k": [None]}]
        picked = self.dice.sample(values, self.dice.randint(1, 4))
        return {"const": picked[0]} if self.dice.random() < 0.3 else {"enum": picked}

    def types(self, depth: int = 0) -> dict[str, Any]:
        return {"type": self.dice.sample(["null", "boolean"], self.dice.randint(1, 2))}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.dice.sample(["a", "b", "name", "x y", "é", 'q"', "list", "$id"], self.dice.randint(0, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.one(depth - 1) for name in names}}
        schema["required"] = [name for name in names if self.dice.random() < 0.6]
        schema["additionalProperties"] = False
        return schema

    def map(self, depth: int) -> dict[str, Any]:
        most = self.dice.randint(1, 3)
        form = self.dice.choice(("additionalProperties", "patternProperties"))
        if form == "additionalProperties":
            return {"type": "object", form: self.one(depth - 1), "maxProperties": most, "minProperties": min(1, most)}
        return {"type": "object", form: {"^k[0-9]$": self.one(depth - 1)}, "additionalProperties": False}

    def array(self, depth: int) -> dict[str, Any]:
        low = self.dice.randint(0, 2)
        return {"type": "array", "items": self.one(depth - 1), "minItems": low, "maxItems": low + 2}

    def tuple(self, depth: int) -> dict[str, Any]:
        first = [self.one(depth - 1) for _ in range(self.dice.randint(1, 3))]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": self.dice.randint(0, len(first))}

    def union(self, depth: int) -> dict[str, Any]:
        if self.dice.random() < 0.5:
            return {"oneOf": [self.string(), self.integer(), self.types()]}
        return {"anyOf": [self.one(depth - 1) for _ in range(self.dice.randint(1, 3))]}

    def joined(self, depth: int) -> dict[str, Any]:
        extra = {"type": "object", "properties": {"also": self.one(0)}, "required": ["also"]}
        own = {"type": "object", "properties": {"own": self.one(depth - 1)}, "required": ["own"]}
        return {"allOf": [own, extra], "maxProperties": 3}

    def reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self.defs)}"
        self.defs[name] = {}
        more = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        properties = {"value": self.one(0), "next": more}
        self.defs[name] = {"type": "object", "properties": properties, "required": ["value", "next"]}
        self.defs[name]["additionalProperties"] = False
        return {"$ref": f"#/$defs/{name}"}
