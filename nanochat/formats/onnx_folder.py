"""An ONNX folder: the graph in float32, and in int8 too, with what programs need to generate text with it.

out/
  onnx/model.onnx                           float32; with model.onnx_data, the tensors, where they exceed 1.9 GB
  onnx/model_quantized.onnx                 int8, on request
  config.json  generation_config.json       as of a Hugging Face folder: the sizes of the cache, where an answer ends
  tokenizer.json  tokenizer_config.json  ...
  nanochat.json  README.md                  as of every export (hf_folder.NanochatFile, model_card.py)

Its layout is that of transformers.js, which Optimum reads too.
"""

from pathlib import Path
from typing import Any

from nanochat.common import write_json
from nanochat.formats import hf_class
from nanochat.formats.card_front import CardOptions
from nanochat.formats.hf_folder import ABOUT, CONFIG, about, generation_config
from nanochat.formats.hf_tokenizer import write_tokenizer
from nanochat.formats.model_card import write_card
from nanochat.formats.onnx_builder import import_onnx
from nanochat.formats.onnx_graph import build_graph, id_layers
from nanochat.formats.portable import PortableModel, new_folder

GRAPHS, FLOAT, INT8 = "onnx", "model.onnx", "model_quantized.onnx"


def write_onnx(model: PortableModel, out: Path, int8: bool = False, card: CardOptions | None = None) -> None:
    """Create the folder `out`. Raises UserError if it exists, or without the package onnx."""
    import_onnx()
    with new_folder(out) as folder:
        (folder / GRAPHS).mkdir()
        comment = f"A {model.source} model of nanochat; what its inputs are: docs/portable.md there."
        external = {
            name: 1
            for name, quantize in [(FLOAT, False), (INT8, True)][: 1 + int8]
            if build_graph(model.config, model.state, quantize).save(folder / GRAPHS / name, comment)
        }
        write_json(folder / CONFIG, config_json(model, external, int8))
        write_json(folder / "generation_config.json", generation_config(model))
        write_json(folder / ABOUT, about(model, "onnx", "float32"))
        write_tokenizer(model.tokenizer, folder, model.is_chat, model.config.sequence_len)
        write_card(model, folder, "onnx", "float32", card)


def config_json(model: PortableModel, external: dict[str, int], int8: bool) -> dict[str, Any]:
    """config.json of transformers' NanoChat class, whose layers are here those of the cache.

    `external` has the number of files beside each graph that has any. Programs use the sizes of the cache, the length
    of the context and the end of a text; what is computed is the graph's own matter.
    """
    fields = hf_class.config_json(model.config, model.tokenizer)
    fields["num_hidden_layers"] += id_layers(model.config)
    script: dict[str, Any] = {"use_external_data_format": external}
    if not int8:
        script["dtype"] = "fp32"  # in browsers it would look for the int8 file
    return {**fields, "transformers.js_config": script, "dtype": "float32"}
