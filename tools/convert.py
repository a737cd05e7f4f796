"""Converts weights to the format of another library, and proves it: same images, same logits, in fresh processes.

python tools/convert.py WEIGHTS OUT --to pretrain|timm|transformers|npz|onnx
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError
from pretrain.models.by_name import LICENCE, is_name, licence_of
from pretrain.models.formats import NPZ_NAMINGS, WRITABLE, add_of_run, check_weights, told_of_run


def main() -> int:
    arguments = _arguments()
    with cli.loading():
        from pretrain.models.convert import Conversion, convert, files_for_hub, loading
        from pretrain.models.publish import check_free
        from pretrain.models.verify import Source, check_installed

    config = str(arguments.config.resolve()) if arguments.trust_pickle else None
    weights = arguments.weights if is_name(arguments.weights) else arguments.weights.resolve()
    conversion = Conversion(
        source=Source(str(weights), arguments.image_size, tuple(arguments.without), config, arguments.of_run),
        target=arguments.to,
        out=arguments.out,
        naming=arguments.naming or "released",
        verified=not arguments.no_verify,
        command=shlex.join(["python", "tools/convert.py", *sys.argv[1:]]),
        repository=arguments.push,
    )
    check_free(conversion.place, conversion.beside, overwrite=arguments.overwrite)
    if conversion.verified:
        check_installed(arguments.to)
    if arguments.push:
        from pretrain.models.hub import check_login

        check_login(arguments.push)
    weights = conversion.source.read()
    conversion = replace(conversion, licence=arguments.license or licence_of(arguments.weights))
    if not convert(conversion, weights):
        return 1
    names = f", {len(weights.class_names)} class names" if weights.class_names else ""
    told = f"{len(weights.tensors)} tensors, {weights.num_classes} classes{names}{told_of_run(weights.of_run)}"
    cli.tell(f"{arguments.out}: {told}. To load it:")
    print(loading(arguments.to, weights, cli.shown(arguments.out)))
    if arguments.push:
        from pretrain.models.hub import push

        print(push(files_for_hub(conversion), arguments.push))
    return 0


def _licence(text: str) -> str:
    if not LICENCE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no word of the hub's list, such as apache-2.0, mit, cc-by-4.0, other"
        )
    return text


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Converts a run (its newest valid checkpoint), a checkpoint step-N, a folder of ours, timm or transformers,\n"
        "a Google .npz, or, with --trust-pickle, a checkpoint that DeepSpeed wrote. Two further processes check that\n"
        "the result gives the source's logits; else nothing is written. docs/conversion.md says what goes where.",
        "python tools/convert.py runs/NAME converted/NAME --to timm",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="what to convert, or timm:NAME ...")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; with --to npz a file NAME.npz")
    parser.add_argument("--to", choices=WRITABLE, required=True, help="format")
    add_of_run(parser)
    parser.add_argument("--naming", choices=NPZ_NAMINGS, help="of npz: as published (default), or of the code of today")
    parser.add_argument(
        "--without", choices=["head", "pre_logits"], nargs="+", default=[], help="parts to leave out of the result"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels: learned positions are resized for it")
    parser.add_argument("--no-verify", action="store_true", help="write without the proof, in a tenth of the time")
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds, once the result is complete")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="execute the pickles of DeepSpeed's checkpoint; needs --config"
    )
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="names the architecture for --trust-pickle")
    parser.add_argument(
        "--license", type=_licence, metavar="NAME", help="for the card: apache-2.0 ... (default: named weights' own)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload to this repository of the Hugging Face hub")
    arguments = parser.parse_args()
    if arguments.trust_pickle != (arguments.config is not None):
        raise UserError("--trust-pickle and --config RECIPE.yaml go together: pickles do not tell their architecture")
    if arguments.trust_pickle and arguments.of_run:
        raise UserError(f"--weights {arguments.of_run} is of our runs, not of --trust-pickle; leave it out")
    if arguments.naming and arguments.to != "npz":
        raise UserError(f"--naming {arguments.naming} is of --to npz, not of --to {arguments.to}")
    if arguments.to == "npz" and arguments.out.suffix != ".npz":
        raise UserError(f"{arguments.out}: --to npz writes a file; give a name that ends in .npz")
    cli.check_least(arguments, image_size=1)
    check_weights(arguments.weights)
    return arguments


if __name__ == "__main__":
    cli.run(main)
