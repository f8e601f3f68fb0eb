"""Checks that a built wheel holds the package, the kernels, the extension and the bundled models, and nothing heavy."""

import sys
import zipfile

REQUIRED = [
    "fastigpt/__init__.py",
    "fastigpt/py.typed",
    "fastigpt/kernels/__init__.py",
    "fastigpt/data/imagenet.txt",
    "fastigpt/data/scenes/config.json",
    "fastigpt/data/scenes/model.safetensors",
    "fastigpt/data/scenes/preprocessor_config.json",
    "fastigpt/data/scenes-128/config.json",
    "fastigpt/data/scenes-128/generation_config.json",
    "fastigpt/data/scenes-128/model.safetensors",
    "fastigpt/data/scenes-128/tokenizer.json",
    "fastigpt/server/static/icon.svg",
    "fastigpt/server/static/mask.js",
    "fastigpt/server/static/page.css",
    "fastigpt/server/static/page.html",
    "fastigpt/server/static/page.js",
    "fastigpt/server/static/pictures.js",
]
FOREIGN = ("kernels/", "tests/", "benchmarks/", "csrc/")
LARGEST = {"scenes": 6 << 20, "scenes-128": 16 * 10**6}  # bytes of the models


def main(path: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    missing = [name for name in REQUIRED if name not in sizes]
    if not any(name.startswith("fastigpt/_C.") for name in sizes):
        missing.append("fastigpt/_C (the extension)")
    foreign = [name for name in sizes if name.startswith(FOREIGN)]
    models = {name: sizes.get(f"fastigpt/data/{name}/model.safetensors", 0) for name in LARGEST}
    if missing or foreign or any(size > LARGEST[name] for name, size in models.items()):
        sys.exit(f"{path}: missing {missing}, foreign {foreign}, models of {models} bytes")
    total = sum(sizes.values()) / 2**20
    print(f"{path.rsplit('/', 1)[-1]}: {len(sizes)} files, {total:.1f} MiB, models of {models} bytes")


main(sys.argv[1])
