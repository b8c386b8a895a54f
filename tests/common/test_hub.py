"""Models of the hub: what is one, where its cache is, and that nothing is asked of a server."""

import pytest
from hub_cache import COMMIT, cached, hub_cache  # noqa: F401

from affectgpt_jax.common.hub import HubError, HubPlace, find, is_cached, model_name, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", HubPlace("Qwen/Qwen2.5-7B-Instruct")),
        ("hf:a/b", HubPlace("a/b")),
        ("hf:a/b@v1.0", HubPlace("a/b", "v1.0")),
        ("hf:a/b/run/x.pth", HubPlace("a/b", None, "run/x.pth")),
        ("hf:a/b@main/x.pth", HubPlace("a/b", "main", "x.pth")),
        ("tiny", None),
        ("Qwen2.5-7B-Instruct", None),
        ("/models/b", None),
        ("./a/b", None),
        ("~/a", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_what_names_a_model_of_the_hub(text, place):
    assert parse_place(text) == place
    assert place is None or str(place) == text.removeprefix("hf:")


def test_what_is_a_path_here_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert parse_place("a/b") is None
    assert parse_place("hf:a/b") == HubPlace("a/b")


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/", "hf:a/../b", "hf:a/b/../../x", "hf:/a/b"])
def test_a_mark_of_the_hub_without_a_model_is_refused(text):
    with pytest.raises(HubError, match="names no model of the hub; expected hf:OWNER/NAME"):
        parse_place(text)


def lacks(*names):
    def missing(directory):
        absent = [name for name in names if not (directory / name).is_file()]
        return f"{absent[0]} is missing" if absent else None

    return missing


def test_a_model_is_found_in_the_cache(hub_cache, tmp_path):  # noqa: F811
    (tmp_path / "m" / "x").mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "x" / "y.pth").write_text("y")
    snapshot = cached(hub_cache, "me/m.1", tmp_path / "m")
    place = HubPlace("me/m.1")
    assert find(place, "config.llm", ["*"], lacks("config.json")) == snapshot
    assert find(HubPlace("me/m.1", COMMIT), "x", ["*"], lacks("config.json")) == snapshot
    file = find(HubPlace("me/m.1", None, "x/y.pth"), "x", ["*"], lacks())
    assert file.read_text() == "y"
    assert is_cached(snapshot) and model_name(snapshot) == "me/m.1"
    assert not is_cached(tmp_path / "m") and model_name(tmp_path / "m") == "m"
    for other, why in (
        (place, "the hub's cache has a part of it: z is missing"),
        (HubPlace("me/other"), "it is not whole in the hub's cache"),
        (HubPlace("me/m.1", "v2"), "it is not whole in the hub's cache"),
        (HubPlace("me/m.1", None, "z"), "it is not whole in the hub's cache"),
    ):
        with pytest.raises(HubError) as error:
            find(other, "config.llm", ["*"], lacks("z"))
        assert str(error.value) == (
            f"config.llm: {other} is no path here, and {why} ({hub_cache}); pass --download to get "
            "it from the hub, or name a path"
        )


def test_what_is_missing_is_downloaded_where_that_is_asked(
    hub_cache,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    import huggingface_hub

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_text("a")
    cached(hub_cache, "me/m", tmp_path / "m")
    local, asked = huggingface_hub.snapshot_download, []

    def server(repository, *, local_files_only, allow_patterns, revision):
        if local_files_only:
            return local(repository, local_files_only=True, revision=revision)
        asked.append((repository, revision, allow_patterns))
        (tmp_path / "m" / "z").write_text("z")
        return str(cached(hub_cache, repository, tmp_path / "m"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", server)
    place = HubPlace("me/m")
    assert (find(place, "x", ["?"], lacks("a", "z"), download=True) / "z").read_text() == "z"
    assert asked == [("me/m", None, ["?"])]
    find(place, "x", ["?"], lacks("a", "z"))
    assert len(asked) == 1, "nothing is asked of a server"
    find(place, "x", ["?"], lacks(), download=True)
    assert len(asked) == 2, "the hub alone knows whether all is there"
    with pytest.raises(HubError, match="^x: me/m was downloaded, but cannot be used: .*q is missi"):
        find(place, "x", ["?"], lacks("q"), download=True)

    def down(repository, *, local_files_only, revision, **_):
        if local_files_only:
            return local(repository, local_files_only=True, revision=revision)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    with pytest.raises(HubError) as error:
        find(place, "x", ["?"], lacks("q"), download=True)
    assert str(error.value).startswith(f"x: me/m cannot be downloaded into {hub_cache}: no route")
    assert "\n" not in str(error.value) and "--download" not in str(error.value)
    with pytest.raises(HubError, match="; what the cache has is used without --download$"):
        find(place, "x", ["?"], lacks("a"), download=True)
