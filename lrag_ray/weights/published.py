"""Where the weights are published: Hub repository, file, size, digest and licence, as far as they are known.

A configured address is matched by its last name alone (``anything/self_forcing.pt``), so keep the names of this table;
they are the published ones but for framewise-4step.pt.
Sizes and digests are those of the Hub's own records at the named revision.
"""

from __future__ import annotations

from typing import NamedTuple

UNKNOWN = "unknown"


class HubFile(NamedTuple):
    """One file of a Hub repository."""

    path: str
    """Path inside the repository."""
    size_bytes: int | None = None
    """Size, or None where it is not known."""
    sha256: str | None = None
    """Digest, or None where it is not known."""
    saved_as: str = ""
    """Its name here, where another published file has the last component of its path."""

    @property
    def name(self) -> str:
        """Its name here: the last component of the path, unless it is saved under another."""
        return self.saved_as or self.path.rsplit("/", 1)[-1]


class Published(NamedTuple):
    """One thing that a configuration may ask for: a file, or a folder of files."""

    name: str
    """Last component of the address in a configuration."""
    repository: str
    """Hub repository."""
    files: tuple[HubFile, ...]
    """The file itself, or the files of the folder."""
    revision: str = "main"
    """Commit, tag or branch."""
    licence: str = UNKNOWN
    """As its repository states it; unknown where that could not be read."""
    is_folder: bool = False
    """Whether `name` is a folder."""

    @property
    def size_bytes(self) -> int | None:
        """Sum over the files, or None where one is not known."""
        sizes = [file.size_bytes for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def source(self) -> str:
        """For people: repository and file."""
        path = self.files[0].path.rsplit("/", 1)[0] + "/" if self.is_folder else self.files[0].path
        return f"{self.repository} {path}"


_RAG, _WAN = "qixinhu11/LongLive-RAG", "Wan-AI/Wan2.1-T2V-1.3B"
_CAUSAL_FORCING = "zhuhz22/Causal-Forcing"
_WAN_REVISION = "37ec512624d61f7aa208f7ea8140a131f93afc9a"
_TOKENIZER = "google/umt5-xxl"


def _rag(name: str) -> Published:
    # The README of the code says Apache-2.0 and does not speak of the weights, some of which are other groups' work.
    return Published(name, _RAG, (HubFile(f"checkpoints/{name}"),), licence="Apache-2.0 (code); see the model card")


def _causal(name: str, path: str) -> Published:
    return Published(
        name, _CAUSAL_FORCING, (HubFile(path, saved_as=name),), licence="Apache-2.0 (code); see the model card"
    )


def _wan(name: str, *files: HubFile, is_folder: bool = False) -> Published:
    return Published(name, _WAN, files, _WAN_REVISION, "Apache-2.0", is_folder)


PUBLISHED: dict[str, Published] = {
    entry.name: entry
    for entry in (
        _rag("self_forcing.pt"),
        _rag("causal_forcing.pt"),
        _rag("longlive_base.pt"),
        _rag("longlive_lora.pt"),
        _rag("ae_latent_mem.pt"),
        _rag("moviegenbench_128_refined.txt"),
        _rag("vidprom_filtered_extended.txt"),
        Published(
            "longvideo.pt",
            _CAUSAL_FORCING,
            (HubFile("chunkwise/longvideo.pt"),),
            licence="Apache-2.0 (code; its long_video folder is for academic use only); see the model card",
        ),
        _causal("framewise-4step.pt", "framewise/causal_forcing.pt"),
        _causal("framewise-2step.pt", "causal-forcing++/framewise-2step.pt"),
        _causal("framewise-1step.pt", "causal-forcing++/framewise-1step.pt"),
        _wan(
            "models_t5_umt5-xxl-enc-bf16.pth",
            HubFile(
                "models_t5_umt5-xxl-enc-bf16.pth",
                11_361_920_418,
                "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
            ),
        ),
        _wan(
            "Wan2.1_VAE.pth",
            HubFile("Wan2.1_VAE.pth", 507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),
        ),
        _wan(
            "umt5-xxl",
            HubFile(
                f"{_TOKENIZER}/special_tokens_map.json",
                6_623,
                "7b8a9f5040adb67b5805abdfd42c1f8d0f3d0e711f10726580eb3789cd0ad61d",
            ),
            HubFile(
                f"{_TOKENIZER}/spiece.model",
                4_548_313,
                "e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458",
            ),
            HubFile(
                f"{_TOKENIZER}/tokenizer.json",
                16_837_417,
                "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
            ),
            HubFile(
                f"{_TOKENIZER}/tokenizer_config.json",
                61_728,
                "ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05",
            ),
            is_folder=True,
        ),
    )
}
"""By name."""
