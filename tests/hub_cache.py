"""The hub's local cache as its own client lays it out, in a folder of a test."""

import shutil

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, repository, source):
    """Put the files below `source` into the cache as a model of the hub; returns its snapshot."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "blobs").mkdir(exist_ok=True)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file():
            blob = place / "blobs" / str(name).replace("/", "_")
            shutil.copyfile(path, blob)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
    return snapshot


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, and no way to any server."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("snapshot_download", "hf_hub_download"):
        real = getattr(huggingface_hub, name)

        def local_alone(*given, real=real, local_files_only=False, **options):
            assert local_files_only, "a server was asked"
            return real(*given, local_files_only=True, **options)

        monkeypatch.setattr(huggingface_hub, name, local_alone)
    return tmp_path / "hub"
