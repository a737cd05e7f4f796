"""The public files of evaluation sets: a row for each file with its address, bytes and checksum.

Checksums are those that TensorFlow Datasets (SHA-256) or torchvision (MD5) publish. The licence is the task's own. Sets
behind a registration or a form are not here.
"""

from typing import NamedTuple


class PublicFile(NamedTuple):
    """A file that anybody may download."""

    url: str
    num_bytes: int
    sha256: str | None = None
    md5: str | None = None


_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_HENDRYCKS = "https://people.eecs.berkeley.edu/~hendrycks"

_CIFAR10 = (
    PublicFile(
        f"{_KRIZHEVSKY}/cifar-10-binary.tar.gz",
        170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
)
_CIFAR100 = (
    PublicFile(
        f"{_KRIZHEVSKY}/cifar-100-binary.tar.gz",
        168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
)
_PETS = (
    PublicFile(
        f"{_OXFORD}/pets/data/images.tar.gz",
        791_918_971,
        sha256="67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
    ),
    PublicFile(
        f"{_OXFORD}/pets/data/annotations.tar.gz",
        19_173_078,
        sha256="52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
    ),
)
_FLOWERS = (
    PublicFile(f"{_OXFORD}/flowers/102/102flowers.tgz", 344_862_509, md5="52808999861908f626f3c1f4e79d11fa"),
    PublicFile(f"{_OXFORD}/flowers/102/imagelabels.mat", 502, md5="e0620be6f572b9609742df49c70aed4d"),
    PublicFile(f"{_OXFORD}/flowers/102/setid.mat", 14_989, md5="a5357ecc9cb78c4bef273ce3793fc85c"),
)
_DTD = (PublicFile(f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", 625_239_812, md5="fff73e5086ae6bdbea199a49dfb8a4c1"),)

PUBLIC = {
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR100,
    "pets": _PETS,
    "flowers": _FLOWERS,
    "imagenet_a": (
        PublicFile(
            f"{_HENDRYCKS}/imagenet-a.tar",
            687_552_512,
            sha256="3bb3632277e6ba6392ea64c02ddbf4dd2266c9caffd6bc09c9656d28f012589e",
        ),
    ),
    "imagenet_r": (
        PublicFile(
            f"{_HENDRYCKS}/imagenet-r.tar",
            2_191_079_936,
            sha256="18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
        ),
    ),
    "vtab/cifar100": _CIFAR100,
    "vtab/dtd": _DTD,
    "vtab/flowers102": _FLOWERS,
    "vtab/pets": _PETS,
}
