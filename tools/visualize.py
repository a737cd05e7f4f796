"""Draws what a trained ViT has learned and where it looks: figures 7 and 6 of the ViT paper.

python tools/visualize.py WEIGHTS [--image PHOTO ...] [--out DIR] [--tensorboard]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.config import model_name
from pretrain.escape import portable
from pretrain.models.formats import check_weights


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Draws the ViT paper's figure 7 (principal components of the patch filters, similarity of position\n"
        "embeddings, attention distance by depth and head) and, of each photo, figure 6 (attention rollout). Writes\n"
        "internals.png, rollout.png and numbers.json. Attention distances are means over the photos: they need some.",
        "python tools/visualize.py runs/NAME --image cat.jpg dog.jpg --out pictures",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, folder, .npz, or timm:NAME ...")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="PHOTO", help="JPEG, PNG or WebP; the central square"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the pictures (default: WEIGHTS/pictures)")
    parser.add_argument("--tensorboard", action="store_true", help="also write the pictures as an event file into DIR")
    arguments = parser.parse_args()
    check_weights(arguments.weights)
    for photo in arguments.image:
        cli.check_found(photo, "a JPEG, PNG or WebP file")
    return arguments


def main() -> None:
    arguments = _arguments()
    with cli.loading():
        import torch

        from pretrain.data.images import to_float
        from pretrain.models.inspection import check_inspectable, filter_components, look_at, position_similarity
        from pretrain.models.weights import model_of, read_weights, results_folder, weights_sha256
        from pretrain.report.pictures import Photo, read_photo, write_pictures

    weights = read_weights(arguments.weights)
    config, model = weights.model, check_inspectable(model_of(weights))
    photos = []
    with cli.progress("attention", len(arguments.image), "photos") as advance:
        for path in arguments.image:
            image = read_photo(path, config.image_size)
            look = look_at(model, config, to_float(image, torch.float32, weights.normalisation))
            photos.append(Photo(path.name, image.permute(1, 2, 0).numpy(), look))
            advance(1)
    filters, positions = filter_components(model), position_similarity(model, config)
    out = arguments.out or results_folder(arguments.weights, "pictures")
    title = f"{portable(str(arguments.weights))}: {model_name(config)}"
    digest, events = weights_sha256(weights.source), arguments.tensorboard
    written = write_pictures(out, title, config, filters, positions, photos, digest=digest, tensorboard=events)
    for path in written:
        cli.tell(path)


if __name__ == "__main__":
    cli.run(main)
