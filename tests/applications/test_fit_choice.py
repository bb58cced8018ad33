"""What is chosen for which pictures: channels, size, condition, splits, and shapes that fit together."""

from pathlib import Path

import pytest

from latentkit.applications.fit import choice
from latentkit.applications.fit.choice import SCALES, choose, model_name, shape, sizes
from latentkit.data.folder import Place
from latentkit.data.source import Item, Source
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import Architecture, fit_network
from latentkit.training.recipe import parse_recipe, resolved


def source(*items, classes=(), **common):
    """A source of items given by their fields."""
    plain = {"width": 100, "height": 100, "channels": 3, "depth": "uint8"}
    found = [
        (Item(key=f"{n:03d}.png", digest=f"{n:064x}", **{**plain, **common, **item}), Place("", 0, 0, (0, 0, 0)))
        for n, item in enumerate(items)
    ]
    return Source(Path("pics"), "plain", found, [], tuple(classes))


def chosen(data, *, size=None, condition="auto", device="cpu"):
    return choose(data, "pics", Path("runs/x"), "x", size=size, condition=condition, seed=3, device=device)


def why(found, what):
    return next(reason for reason in found.reasons if reason.what == what)


@pytest.mark.parametrize(
    ("items", "channels"),
    [
        ([{}] * 4, 3),
        ([{"channels": 1}] * 4, 1),
        ([{"channels": 1}] * 3 + [{}], 3),
        ([{"channels": 7}] * 4, 7),
        ([{"channels": 4, "alpha": True, "transparent": True}] * 3 + [{}], 4),
        ([{"channels": 2, "alpha": True, "transparent": True}] * 4, 2),
        ([{"channels": 4, "alpha": True, "transparent": False}] * 4, 3),
        ([{"channels": 4, "alpha": True, "transparent": True}] * 2 + [{}] * 2, 3),
    ],
)
def test_channels_are_as_stored_and_alpha_is_kept_where_most_use_it(items, channels):
    found = chosen(source(*items))
    assert found.autoencoder.network.picture_channels == channels
    assert found.autoencoder.data.transform.channels == found.diffusion.data.transform.channels == channels


def test_pictures_of_different_kinds_are_refused():
    with pytest.raises(InputError, match=r"2 of 3, 1 of 5"):
        chosen(source({}, {}, {"channels": 5}))
    with pytest.raises(InputError, match="at least two"):
        chosen(source({}))


@pytest.mark.parametrize(
    ("side", "device", "size"),
    [(100, "cpu", 64), (100, "cuda", 96), (40, "cpu", 32), (10, "cpu", 16), (4000, "cpu", 64), (4000, "cuda", 256)],
)
def test_size_by_the_median_short_side_and_the_device(side, device, size, monkeypatch):
    monkeypatch.setattr(choice, "_precision", lambda device: "float32")
    assert (
        chosen(source(*[{"width": side, "height": 2 * side}] * 3), device=device).autoencoder.data.transform.size
        == size
    )


@pytest.mark.parametrize(
    ("shapes", "buckets", "said"),
    [
        ([(100, 100)] * 3, False, "all are square"),
        ([(100, 100)] * 9 + [(100, 190)], False, "they lose 4.7% of their area: at most 10%"),
        ([(100, 150)] * 3, True, "one square would cut off 33% of their area: more than 10%; 80x48 (3)"),
        ([(150, 100), (100, 150), (100, 150)], True, "48x80 (2), 80x48 (1)"),
    ],
)
def test_pictures_keep_their_shape_where_a_square_would_cut_much(shapes, buckets, said):
    found = chosen(source(*({"width": width, "height": height} for width, height in shapes)))
    assert found.autoencoder.data.transform.buckets is found.diffusion.data.transform.buckets is buckets
    assert said.replace("80x48 (3)", "48x80 (3)") in why(found, "shape").why


def test_size_asked_for():
    assert chosen(source({}, {}), size=128).diffusion.data.transform.size == 128
    for wrong in (50, 8, 0, -64, 4096):
        with pytest.raises(InputError, match=r"does not fit; nearest: \d+ and \d+") as caught:
            chosen(source({}, {}), size=wrong)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("device", SCALES)
def test_every_size_fits_both_networks(device, monkeypatch):
    monkeypatch.setattr(choice, "_precision", lambda device: "float32")
    seen = set()
    for size in sizes():
        if (kind := shape(size)) in seen:
            continue
        seen.add(kind)
        found = chosen(source({}, {}), size=size, device=device)
        assert found.autoencoder.network.downsampling == 2 * kind[0]
    for size in sizes():
        stem, multipliers = shape(size)
        assert size % (2 * stem) == 0
        assert size // (2 * stem) % 2 ** (len(multipliers) - 1) == 0
        assert size // (2 * stem) // 2 ** (len(multipliers) - 1) >= 2
    assert 64 in sizes()
    assert len(seen) == 4


@pytest.mark.parametrize("device", SCALES)
@pytest.mark.parametrize("words", [{"caption": "a red fox"}, {"label": "fox"}, {}])
def test_recipes_are_whole(device, words, monkeypatch):
    """They read back as they were written, and their parts build one model."""
    monkeypatch.setattr(choice, "_precision", lambda device: "float32")
    other = {key: value + " two" for key, value in words.items()}
    found = chosen(source(words, other, other, classes=("fox", "fox two") if "label" in words else ()), device=device)
    for recipe in (found.autoencoder, found.diffusion):
        assert parse_recipe(resolved(recipe)) == recipe
    assert found.diffusion.seed == found.autoencoder.seed == 3
    assert found.diffusion.first_stage == "runs/x/autoencoder"
    network = fit_network(
        Architecture(
            network=found.diffusion.network, first_stage=found.autoencoder.network,
            text=found.diffusion.text, label=found.diffusion.label,
        )
    ).network  # fmt: skip
    assert network.channels_in == FirstStage(found.autoencoder.network, 3).latent_channels
    assert (network.context_width is None) == (not words)
    assert found.diffusion.sampling.guidance_scale == (2.0 if words else 1.0)


def test_condition_by_what_is_said():
    captions = [{"caption": f"number {n}"} for n in range(4)]
    labels = [{"label": "a"}, {"label": "b"}]
    both = source(*({**c, **labels[n % 2]} for n, c in enumerate(captions)), classes=("a", "b"))
    assert chosen(both).diffusion.text is not None
    assert chosen(both).diffusion.label is None
    asked = chosen(both, condition="label").diffusion
    assert (asked.text, asked.label is not None) == (None, True)
    none = chosen(both, condition="none").diffusion
    assert none.text is none.label is None
    few = source(captions[0], {}, {}, {})
    assert chosen(few).diffusion.text is None
    assert "1 captions" in why(chosen(few), "condition").why
    assert chosen(few, condition="text").diffusion.text is not None
    alike = source(*[{"caption": "pot"}] * 4)
    assert chosen(alike).diffusion.text is None


@pytest.mark.parametrize(
    ("condition", "message"),
    [("text", "no picture has a caption"), ("label", "0 classes"), ("texts", "did you mean 'text'")],
)
def test_a_condition_that_is_not_there(condition, message):
    with pytest.raises(InputError, match=message):
        chosen(source({}, {}), condition=condition)


def test_long_captions_get_room_and_one_giant_does_not_count():
    short = [{"caption": f"cat {n}"} for n in range(200)]
    assert chosen(source(*short)).diffusion.text.length == 8
    assert chosen(source(*short, {"caption": "very " * 300})).diffusion.text.length == 8
    long = [{"caption": " ".join(f"w{n}{k}" for k in range(30))} for n in range(20)]
    assert 31 <= chosen(source(*long)).diffusion.text.length <= 77


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ((None, None, None), (None, None)),
        (("train", "train", "validation"), ("train", "validation")),
        (("train", "test", "validation"), ("train", "validation")),
        ((None, None, "holdout"), (None, "holdout")),
        (("train", "train", "train"), (None, None)),
        (("test", "test", "test"), (None, None)),
    ],
)
def test_splits_that_the_data_names(splits, expected):
    data = chosen(source(*({"split": split} for split in splits))).autoencoder.data
    assert (data.split, data.holdout) == expected


@pytest.mark.parametrize(
    ("folder", "name"),
    [("photos", "photos"), ("my photos (2019)", "my-photos-2019"), ("..", "model"), ("Ünter", "nter"), (".a", "a")],
)
def test_names_from_folders(folder, name):
    assert model_name(folder) == name


@pytest.mark.parametrize(
    ("count", "side", "zoom"), [(5, 400, 4), (5, 150, 2), (5, 100, 1), (choice.MANY, 400, 1), (choice.MANY - 1, 400, 4)]
)
def test_few_pictures_are_also_shown_in_parts_to_the_first_stage(count, side, zoom):
    found = chosen(source(*[{"width": side, "height": side}] * count))
    assert found.autoencoder.data.transform.zoom == zoom
    assert found.autoencoder.data.transform.crop == ("center" if zoom == 1 else "random")
    assert found.diffusion.data.transform == found.autoencoder.data.transform.model_copy(
        update={"zoom": 1, "crop": "center"}
    )
