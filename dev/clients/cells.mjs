// cells.py for Node: what the checks share.
export const URL_ = (process.argv[2] ?? "http://localhost:8000").replace(/\/$/, "");
export const API = `${URL_}/v1`;
export const MODEL = (await (await fetch(`${API}/models`)).json()).data[0].id;
export const HI = [{ role: "user", content: "What is 12 + 30?" }];
export const SCHEMA = {
  type: "object",
  properties: { name: { type: "string", maxLength: 12 }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const parameters = { type: "object", properties: { a: { type: "number" }, b: { type: "number" } } };
export const TOOL = { type: "function", function: { name: "add", description: "Adds two numbers", parameters } };
const call = { id: "call_1", type: "function", function: { name: "add", arguments: '{"a": 12, "b": 30}' } };
export const AFTER_CALL = [
  ...HI,
  { role: "assistant", content: null, tool_calls: [call] },
  { role: "tool", tool_call_id: "call_1", content: "42" },
];
export const TOO_LONG = "word ".repeat(40000);

export function check(holds, what) {
  if (!holds) throw new Error(typeof what === "string" ? what : JSON.stringify(what));
}

export function checkPerson(value) {
  check(Object.keys(value).sort().join() === "age,name" && value.age >= 0 && value.age <= 120, value);
}

// Require an error with this HTTP status and a text that has the word.
export async function expect(call, status, word) {
  try {
    await call();
  } catch (error) {
    check((error.status ?? error.statusCode) === status && `${error.message} ${error.responseBody}`.includes(word), `${error}`);
    return;
  }
  throw new Error("no error");
}

// Print {column: "ok" or what failed} as the last line.
export async function run(functions) {
  const found = {};
  for (const [column, work] of Object.entries(functions)) {
    try {
      await work();
      found[column] = "ok";
    } catch (error) {
      console.error(error);
      found[column] = `${error}`.slice(0, 300);
    }
  }
  console.log(JSON.stringify(found));
}
