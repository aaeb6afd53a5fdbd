"""Directions for other tools: GGUF control vectors for llama.cpp and repeng, and the card that says what they are.

`direction.N` is added to the output of block N (counted from 0; llama.cpp's loader and repeng agree), at every position,
times the strength given there. The exported vector is `scale · ŵ`, so that strength is our `coeff`. Block 0 cannot be
expressed in the format.
"""

import tempfile
from pathlib import Path

import gguf
import numpy as np

from lib.errors import BadInput
from lib.model.interventions import unit

ARCHITECTURE = "controlvector"


def control_vector(directions: dict[int, np.ndarray], *, scale: float, model_type: str, n_layers: int) -> bytes:
    """A GGUF file of one direction a layer, each at length `scale`."""
    for layer in directions:
        if not 1 <= layer < n_layers:
            raise BadInput(f"layer {layer}: a control vector holds layers 1 to {n_layers - 1}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", (unit(direction) * scale).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def read_control_vector(path: Path) -> dict[int, np.ndarray]:
    """`{layer: vector}` of a GGUF control vector, whoever wrote it."""
    reader = gguf.GGUFReader(path)
    return {int(tensor.name.split(".")[1]): np.array(tensor.data) for tensor in reader.tensors if tensor.name.startswith("direction.")}


def card(*, model_id: str, weights_sha256: str, layer: int, d_model: int, scale: float, n_scenarios: int, names: dict[str, str],
         agreement: dict[str, float], license: str) -> str:
    """The model card in Markdown: what each direction is, the layer convention, the unit and the norm."""
    rows = "\n".join(f"| {name} | {what} | {agreement.get(name, float('nan')):.2f} |" for name, what in names.items())
    return f"""# Directions of {model_id}

| direction | difference of mean residuals | cosine between the halves |
| --- | --- | --- |
{rows}

- **Layer**: output of block {layer}, counted from 0 (`blocks.{layer}.hook_out`, Hugging Face `hidden_states[{layer + 1}]`).
- **Norm**: `directions.safetensors` holds unit vectors of {d_model} numbers, one a register and half of the scenarios it was
  fitted on (`name/register/half`: tested on that half). The `.gguf` files hold the mean over these, at length {scale:.2f}.
- **Unit**: {scale:.2f} is the mean residual norm at this layer over prompts, sinks left out. Strength 0.1 in llama.cpp or repeng
  therefore adds a tenth of a residual norm, which is `coeff` 0.1 here. The coherent range is in `bandwidth/metrics.json`.
- **Use**: `--control-vector-scaled cognitive.gguf 0.2` (llama.cpp), `ControlVector.import_gguf` (repeng; wrap layer {layer} only).
- **Fitted on** replies to {n_scenarios} scenarios that language models wrote. A direction is a difference of means over such texts; whether
  it does anything is what `metrics.json` beside it says.
- **Weights**: sha256 {weights_sha256}; their licence: {license}.
"""
