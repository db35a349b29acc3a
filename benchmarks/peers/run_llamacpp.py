"""llama.cpp's k-quants and i-quants, with an importance matrix from the same rows.

The model is handed to `llama-quantize` as a GGUF file without a tokenizer, which quantizing does
not need, and the importance matrix (the sum of squares of each linear's inputs, as `llama-imatrix`
defines it) is computed from the token rows. Rows of a weight are quantized one by one, so that
their order does not matter, and q and k are not permuted for llama.cpp's rotary embedding.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import dense
import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

ARCHITECTURE = gguf.MODEL_ARCH.LLAMA
KEPT = "f16"  # embedding and head, as in every other method here


def main() -> None:
    """Quantize to a llama.cpp type and save what the file dequantizes to."""
    parser = dense.arguments(__doc__.splitlines()[0])
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the built program")
    parser.add_argument("--type", required=True, help="of llama.cpp, such as Q2_K")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if model.config.model_type != "llama":
        raise SystemExit(f"{args.model}: a {model.config.model_type}, this writes llama only")
    names = gguf.get_tensor_name_map(ARCHITECTURE, model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "full.gguf", model, names)
        write_importances(folder / "imatrix.gguf", model, dense.read_rows(args.rows), names)
        quantize(args, folder)
        reader = gguf.GGUFReader(folder / "quantized.gguf")
        stored = {tensor.name: tensor for tensor in reader.tensors}
        weights, bits = {}, 0
        for linear in dense.decoder_linears(model):
            tensor = stored[gguf_name(names, linear)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights[f"{linear}.weight"] = torch.from_numpy(np.array(values, dtype=np.float32))
            bits += 8 * tensor.n_bytes
        count = sum(weight.numel() for weight in weights.values())
        dense.save_dense(
            args.model,
            weights,
            args.out,
            stored_bits=bits / count,
            made_by=f"llama.cpp {args.type}, importance matrix",
        )


def gguf_name(names: gguf.TensorNameMap, module: str) -> str:
    """llama.cpp's name of a module's weight."""
    return f"{names.get_name(module)}.weight"


def write_model(file: Path, model: nn.Module, names: gguf.TensorNameMap) -> None:
    """All weights in float32, and the sizes that `llama-quantize` reads."""
    config: PretrainedConfig = model.config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        writer.add_tensor(gguf_name(names, name.removesuffix(".weight")), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def write_importances(
    file: Path, model: nn.Module, rows: Tensor, names: gguf.TensorNameMap
) -> None:
    """Sums of squares of every linear's inputs `[in_features]`, over all tokens of the rows."""
    sums: dict[str, Tensor] = {}

    def collect(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    for name, linear in dense.decoder_linears(model).items():
        linear.register_forward_pre_hook(collect(name))
    for batch in rows.split(8):
        model(batch)
    writer = gguf.GGUFWriter(file, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["rows"])
    writer.add_uint32("imatrix.chunk_count", len(rows))
    writer.add_uint32("imatrix.chunk_size", rows.shape[1])
    for name, squares in sums.items():
        tensor = gguf_name(names, name)
        writer.add_tensor(f"{tensor}.in_sum2", squares[None].numpy())
        writer.add_tensor(f"{tensor}.counts", np.full((1, 1), rows.numel(), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(args: argparse.Namespace, folder: Path) -> None:
    """Run `llama-quantize` on the files in `folder`."""
    command = [args.llama_quantize, "--imatrix", folder / "imatrix.gguf"]
    command += ["--token-embedding-type", KEPT, "--output-tensor-type", KEPT]
    command += [folder / "full.gguf", folder / "quantized.gguf", args.type]
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
