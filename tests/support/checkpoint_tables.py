"""The tables of docs/checkpoints.md: what is read, and the tests of each row.

    .venv/bin/python tests/support/checkpoint_tables.py

writes the tables anew into the document, each between its two comments. tests/support/test_checkpoint_tables.py checks
that the document has them as they are here, and that every test exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "checkpoints.md"
MARKED = re.compile(r"(?P<start><!-- table: (?P<name>[a-z ]+) -->\n).*?(?P<end>\n<!-- end of the table -->)", re.DOTALL)
HERE = "tests/export/checkpoint"


@dataclass(frozen=True)
class Table:
    """A table: its headings, and its rows. The last cell of a row names its tests, as FILE::TEST, below HERE."""

    headings: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def row(*cells: str, tests: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row of these cells, tested by these tests."""
    return cells, tests


LAYOUTS = Table(
    ("form", "written by", "compared with"),
    (
        row(
            "a folder in diffusers' layout",
            "diffusers",
            "diffusers, which makes the same picture",
            tests=(
                "tests/chain/test_picture.py::test_flux_tiny",
                "tests/chain/test_picture_sd3.py::test_the_same_picture",
            ),
        ),
        row(
            "shards with an index, variants such as fp16",
            "diffusers, transformers",
            "both, which write them",
            tests=(
                "test_component_files.py::test_what_diffusers_and_transformers_write",
                "test_component_files.py::test_the_option",
                "test_component_files.py::test_the_index_wins_over_a_stale_single_file",
            ),
        ),
        row(
            "a folder with only a transformer, and `--base`",
            "trainers",
            "diffusers",
            tests=("test_unread.py::test_a_folder_with_only_a_transformer",),
        ),
        row(
            "one file with FLUX.1's DiT",
            "Black Forest Labs, ComfyUI, sd-scripts, wrappers such as `module.`",
            "diffusers' module, bit for bit",
            tests=("test_conversion.py::test_flux_dit", "test_source.py::test_only_the_dit_comes_from_the_file"),
        ),
        row(
            "one file with Stable Diffusion 3 or 3.5, with or without text encoders",
            "Stability, ComfyUI",
            "diffusers' modules, bit for bit",
            tests=(
                "test_conversion.py::test_stability_single_file",
                "test_unread.py::test_an_all_in_one_file_without_a_projection",
            ),
        ),
        row(
            "one file with all networks of FLUX.1",
            "ComfyUI, Forge",
            "diffusers' modules, and the export of the folder",
            tests=(
                "test_conversion.py::test_comfyui_all_in_one_in_float8",
                "test_source.py::test_export_of_all_in_one_is_that_of_the_folder",
            ),
        ),
        row(
            "one file with diffusers' names: a DiT, an autoencoder, CLIP",
            "diffusers, trainers",
            "diffusers' modules, bit for bit",
            tests=(
                "test_conversion.py::test_names_of_diffusers",
                "test_conversion.py::test_other_components_with_names_of_diffusers",
            ),
        ),
        row(
            "one file with an autoencoder or a text encoder",
            "Black Forest Labs, Stability, ComfyUI",
            "diffusers' and transformers' modules",
            tests=(
                "test_conversion.py::test_autoencoder_alone",
                "test_unread.py::test_a_text_encoder_or_an_autoencoder_alone",
            ),
        ),
        row(
            "GGUF with FLUX.1's or Stable Diffusion 3.5's DiT, or with T5",
            "ComfyUI-GGUF, llama.cpp, stable-diffusion.cpp",
            "gguf",
            tests=("test_gguf_file.py::test_flux", "test_gguf_file.py::test_sd3", "test_gguf_file.py::test_t5"),
        ),
        row(
            "a repository of the Hugging Face Hub, or a file in one",
            "huggingface_hub",
            "a server that speaks its protocol",
            tests=(
                "test_hub.py::test_only_what_is_needed_is_downloaded",
                "test_hub.py::test_one_file_and_what_it_lacks_from_another_repository",
            ),
        ),
        row(
            "tokenizers with only a `spiece.model`",
            "sentencepiece",
            "sentencepiece",
            tests=("tests/export/text_encoders/test_tokenizers.py::test_only_a_sentencepiece_model",),
        ),
    ),
)

WEIGHTS = Table(
    ("weights", "scales", "written by"),
    (
        row("float8 (E4M3, E5M2)", "none", "casts", tests=("test_dequantising.py::test_float8_folder_without_scales",)),
        row(
            "float8",
            "one for a weight or a row: `scale_weight`, `weight_scale`",
            "ComfyUI, fbgemm, compressed-tensors, ModelOpt",
            tests=("test_dequantising.py::test_float8_folder", "test_dequantising.py::test_one_scale_a_row"),
        ),
        row(
            "float8",
            "one for a block: `weight_scale_inv`, `weight_scale`",
            "DeepSeek's and transformers' `fp8`",
            tests=("test_dequantising.py::test_blocks_as_deepseek_has_them",),
        ),
        row(
            "MXFP8",
            "one power of two for 32 numbers",
            "ComfyUI, ModelOpt, compressed-tensors",
            tests=("test_dequantising.py::test_mxfp8_in_rows", "test_dequantising.py::test_mxfp8_of_comfyui"),
        ),
        row(
            "NVFP4",
            "one float8 for 16 numbers, and one for the weight",
            "ComfyUI, ModelOpt, compressed-tensors, Black Forest Labs",
            tests=("test_dequantising.py::test_nvfp4", "test_dequantising.py::test_nvfp4_file_of_flux"),
        ),
        row(
            "GGUF: Q8_0, Q4_0 to Q6_K, IQ4_NL, IQ4_XS and all others that the package gguf dequantises",
            "in the blocks",
            "llama.cpp, ComfyUI-GGUF",
            tests=("test_gguf_file.py::test_every_type_that_gguf_dequantises",),
        ),
    ),
)

REFUSED = Table(
    ("refused by name", "told by"),
    (
        row(
            "bitsandbytes, GPTQ, AWQ, Nunchaku (SVDQuant), Quanto, torchao, SDNQ, DFloat11, HQQ, AQLM, MLX",
            "the names of tensors, `quantization_config`",
            tests=(
                "test_refused_formats.py::test_packed_weights",
                "test_refused_formats.py::test_more_packers",
                "test_dequantising.py::test_methods_that_a_configuration_names",
            ),
        ),
        row(
            "pickles (`.ckpt`, `.pt`, `.bin`), which can run code when opened, and files that are no weights",
            "the first bytes",
            tests=(
                "test_refused_formats.py::test_files_of_other_formats",
                "test_refused_formats.py::test_files_that_are_something_else",
            ),
        ),
        row("numbers that PyTorch lacks", "their type", tests=("test_refused_formats.py::test_element_types",)),
        row(
            "weights that are NaN or infinite",
            "the weights",
            tests=("test_weights.py::test_a_weight_that_is_no_number",),
        ),
        row("one shard of several", "the file's name", tests=("test_conversion.py::test_a_shard_is_no_model",)),
        row(
            "Chroma, FLUX.2, FLUX.1 Fill, Canny, Depth and Redux, SDXL, Qwen-Image, Z-Image, Wan and others",
            "the names and shapes of tensors, the pipeline of a folder",
            tests=(
                "test_architectures.py::test_single_files",
                "test_architectures.py::test_flux_with_a_picture_as_input",
                "test_architectures.py::test_folders",
            ),
        ),
        row(
            "text encoders, autoencoders and upscalers of other models",
            "the names of tensors",
            tests=("test_architectures.py::test_components_of_other_models",),
        ),
        row(
            "IP-Adapters, ControlNets, control LoRAs, textual inversions, GLoRA, IA3, VeRA, LoRAs for Nunchaku, …",
            "the names of tensors",
            tests=(
                "test_description.py::test_adapters_that_cannot_be_merged",
                "adapters/test_fusing.py::test_what_fits_nothing_is_refused",
            ),
        ),
    ),
)

LORAS = Table(
    ("kind", "written by", "compared with"),
    (
        row(
            "LoRA, with biases and rank-stabilised ones too",
            "all tools",
            "PEFT, diffusers, LyCORIS",
            tests=(
                "adapters/test_lora.py::test_of_peft",
                "adapters/test_lora.py::test_of_lycoris",
                "adapters/test_fusing.py::test_against_diffusers_and_peft",
            ),
        ),
        row(
            "LoRA of convolutions, with a Tucker core (LoCon)",
            "LyCORIS",
            "LyCORIS",
            tests=("adapters/test_lora.py::test_convolutions",),
        ),
        row(
            "DoRA, alone or with LoHa and LoKr",
            "PEFT, LyCORIS, Kohya's scripts, ComfyUI",
            "PEFT, LyCORIS",
            tests=("adapters/test_dora.py::test_of_peft", "adapters/test_dora.py::test_of_lycoris"),
        ),
        row(
            "LoHa, LoKr",
            "PEFT, LyCORIS",
            "PEFT, LyCORIS",
            tests=(
                "adapters/test_loha.py::test_of_peft",
                "adapters/test_loha.py::test_of_lycoris",
                "adapters/test_lokr.py::test_of_peft",
                "adapters/test_lokr.py::test_of_lycoris",
            ),
        ),
        row(
            "OFT",
            "PEFT, LyCORIS, Kohya's scripts",
            "PEFT, LyCORIS",
            tests=(
                "adapters/test_oft.py::test_of_peft",
                "adapters/test_oft.py::test_of_lycoris",
                "adapters/test_oft.py::test_of_kohya",
            ),
        ),
        row("BOFT", "LyCORIS", "LyCORIS", tests=("adapters/test_oft.py::test_butterflies",)),
        row(
            "differences of weights, biases and norms; whole weights",
            "LyCORIS, ComfyUI, PEFT",
            "LyCORIS, PEFT",
            tests=(
                "adapters/test_difference.py::test_weights_and_biases",
                "adapters/test_difference.py::test_norms_of_clip",
                "adapters/test_difference.py::test_norms_of_queries",
                "adapters/test_difference.py::test_a_whole_weight_has_no_strength",
            ),
        ),
        row(
            "LoRA of attention processors", "XLabs", "diffusers", tests=("adapters/test_names.py::test_names_of_xlabs",)
        ),
    ),
)

STRENGTHS = Table(
    ("what tells alpha", "written by"),
    (
        row(
            "a tensor `alpha` beside the matrices",
            "Kohya's scripts, LyCORIS, OneTrainer",
            tests=("adapters/test_fusing.py::test_authors_names",),
        ),
        row(
            "`lora_adapter_metadata` in the file's header",
            "diffusers",
            tests=(
                "adapters/test_fusing.py::test_alpha_in_the_metadata_that_diffusers_writes",
                "adapters/test_settings.py::test_metadata_without_a_prefix",
            ),
        ),
        row(
            "`adapter_config.json` beside the file, with patterns",
            "PEFT",
            tests=("adapters/test_settings.py::test_adapter_config",),
        ),
        row(
            "nothing: it is the rank; other metadata that speak of an alpha are a warning",
            "others",
            tests=(
                "adapters/test_settings.py::test_kohyas_metadata_has_no_effect_and_that_is_said",
                "adapters/test_settings.py::test_metadata_that_nobody_reads",
            ),
        ),
    ),
)

TABLES = {"layouts": LAYOUTS, "weights": WEIGHTS, "refused": REFUSED, "loras": LORAS, "strengths": STRENGTHS}


def place(test: str) -> tuple[Path, str]:
    """The file of a test, and its name."""
    file, _, name = test.partition("::")
    return ROOT / (file if file.startswith("tests/") else f"{HERE}/{file}"), name


def all_tests() -> Iterator[str]:
    """All tests that the tables name."""
    for table in TABLES.values():
        for _, tests in table.rows:
            yield from tests


def rendered(table: Table) -> str:
    """The table in Markdown, with a link to the file of each test."""
    headings = (*table.headings, "tested by")
    lines = [headings, ("---",) * len(headings)]
    for cells, tests in table.rows:
        links = (f"[{name}](../{file.relative_to(ROOT)})" for file, name in map(place, tests))
        lines.append((*cells, ", ".join(links)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def renewed(text: str) -> str:
    """The document with its tables as they are here. Raises KeyError for a table that is not here."""
    return MARKED.sub(lambda match: match["start"] + rendered(TABLES[match["name"]]) + match["end"], text)


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
