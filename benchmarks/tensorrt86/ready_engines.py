"""A folder of engines around plans that are there, as `ditforge build --compiler tensorrt` would have written it.

    python ready_engines.py out/opset17/flux-tiny-fp32 PLANS OUT [--on-demand t5,vae_decoder]

PLANS has NETWORK.plan for each network of the export, compiled by TensorRT 8.6 for SIZES and BATCH.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ditforge import manifest
from ditforge.contract import TOKENIZER
from ditforge.engines.compilers.tensorrt import COMPILER
from ditforge.engines.profile import announced, make_profiles
from ditforge.manifest import Engine, Manifest
from ditforge.placement import Placement

SIZES, BATCH, TARGET = "64-128-256", 4, "sm_90"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("plans", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--on-demand", type=lambda text: text.split(","), default=[])
    args = parser.parse_args()
    source = manifest.read(args.onnx, "onnx")
    args.out.mkdir(parents=True)
    shutil.copytree(args.onnx / TOKENIZER, args.out / TOKENIZER)
    components, engines, version = dict(source.components), {}, COMPILER.version()
    for name in (name for name in source.components if name != TOKENIZER):
        plan = Path(shutil.copy(args.plans / f"{name}.plan", args.out))
        components[name] = components[name].model_copy(update={"files": {plan.name: manifest.describe(plan)}})
        engines[name] = Engine(
            compiler=COMPILER.name,
            compiler_version=version,
            target=TARGET,
            cache_key={"compiler": COMPILER.name},
            triton_backend=COMPILER.triton_backend,
            max_batch=BATCH,
            placement=Placement(on_demand=int(name in args.on_demand)),
        )
    model = announced(source.model, make_profiles(source.model, SIZES, None, BATCH))
    manifest.write(Manifest(kind="engines", model=model, components=components, engines=engines), args.out)


if __name__ == "__main__":
    main()
