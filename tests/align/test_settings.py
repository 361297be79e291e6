"""The defaults are the paper's; what is chosen for the user is said; what would do nothing is refused."""

import subprocess
import sys

import pytest

from sail_align.align.settings import PRESETS, FitSettings, check_options, choose_settings, number_or_auto
from sail_align.extract.errors import UserError


def choose(rows=5_000_000, image_dim=2048, text_dim=1024, **options):
    check_options(options)
    return choose_settings(options, rows=rows, image_dim=image_dim, text_dim=text_dim)


def test_the_defaults_are_the_papers():
    settings, notes = choose()
    assert settings == FitSettings(
        head="glu",
        expansion=4,
        dim=1024,
        image_dropout=0.0,
        text_dropout=0.0,
        image_power=1.0,
        start="random",
        loss="sigmoid",
        divisor="pairs",
        temperature=20.0,
        bias=-10.0,
        optimizer="lion",
        lr=1e-5,
        weight_decay=1e-7,
        warmup=0.0,
        batch_size=36_864,
        steps=round(50 * 5_000_000 / 36_864),
        seed=0,
    )
    assert notes == ["5,000,000 pairs: the settings are those of preset 'paper' (--preset small for the others)."]


def test_few_pairs_get_the_small_preset_and_a_sentence():
    settings, notes = choose(rows=2_000)
    assert (settings.start, settings.dim, settings.batch_size) == ("closed-form", 256, 512)
    assert settings.image_dropout == PRESETS["small"]["image_dropout"]
    assert choose(rows=2_000, head="cca", image_power=0.5)[0].image_power == 0.5
    assert notes == ["2,000 pairs: the settings are those of preset 'small' (--preset paper for the others)."]


def test_a_closed_form_start_needs_no_long_way():
    assert not any("hardly learned" in note for note in choose(rows=2_000, preset="small", steps=10)[1])


def test_the_papers_settings_on_few_pairs_say_that_they_leave_a_run_untrained():
    settings, notes = choose(rows=2_000, preset="paper")
    assert settings.batch_size == 2_000
    assert notes[0] == "A batch of 36,864 is more than there are pairs: reduced to all 2,000."
    assert notes[1].startswith("50 steps at a rate of 1e-05 move no weight by more than 0.0003: expect a run that has")


def test_what_the_user_gives_overrides_the_preset():
    settings, notes = choose(rows=2_000, preset="small", lr=1e-3, steps=100, batch_size=100, dim=64)
    assert (settings.lr, settings.steps, settings.batch_size, settings.dim) == (1e-3, 100, 100, 64)
    assert notes == []


def test_a_closed_form_has_256_dimensions_or_as_many_as_there_are():
    assert choose(head="cca")[0].dim == 256
    assert choose(start="closed-form")[0].dim == 256
    assert choose(head="cca", text_dim=100)[0].dim == 100
    assert choose(head="cca")[0].steps == 0


def test_an_automatic_temperature_brings_an_automatic_bias_unless_one_is_given():
    assert choose(temperature="auto")[0].bias == "auto"
    assert choose(temperature="auto", preset="small")[0].bias == "auto"
    assert choose(temperature="auto", bias=-3.0)[0].bias == -3.0
    assert choose(bias="auto")[0].temperature == 20.0
    assert [number_or_auto("bias", text) for text in (None, "auto", "-3")] == [None, "auto", -3.0]
    with pytest.raises(UserError, match="--bias 'low' is neither a number nor auto"):
        number_or_auto("bias", "low")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head": "gru"}, "--head 'gru' is none of: linear, mlp, glu, cca."),
        ({"preset": "big"}, "--preset 'big' is none of: paper, small."),
        ({"lr": -1e-3}, "--lr -0.001 is out of range; give a number from 1e-09 to 1."),
        ({"lr": float("nan")}, "--lr nan is out of range; give a number from 1e-09 to 1."),
        ({"held_out": 0.9}, "--held-out 0.9 is out of range; give a number from 0 to 0.5."),
        ({"batch_size": 1}, "--batch-size 1 is out of range; give a number from 2 to 1e+06."),
        (
            {"head": "cca", "lr": 1e-3},
            "--lr has no effect with --head cca, which is computed and not trained; leave one",
        ),
        (
            {"head": "linear", "expansion": 8},
            "--expansion has no effect with --head linear, which has no hidden units;",
        ),
        ({"image_power": 0.0}, "--image-power 0 is out of range; give a number from 0.1 to 1."),
        ({"temperature": 0.5}, "--temperature 0.5 is out of range; give a number from 1 to 100."),
        ({"loss": "infonce", "bias": 0.0}, "--bias has no effect with --loss infonce; leave one of them out."),
        (
            {"loss": "infonce", "temperature": "auto"},
            "--temperature auto balances the sigmoid loss; give a number with",
        ),
        ({"head": "cca", "bias": "auto"}, "--bias has no effect with --head cca, which is computed"),
        ({"ridge": 3.0}, "--ridge has no effect with --start random; leave one of them out."),
        (
            {"loss": "infonce", "divisor": "batch"},
            "--divisor has no effect with --loss infonce; leave one of them out.",
        ),
        ({"steps": 5, "epochs": 5.0}, "--epochs has no effect with --steps; leave one of them out."),
        (
            {"head": "cca", "dim": 2000},
            "--dim 2000 is more than a closed form of 2048 and 1024 dimensions has; give at",
        ),
    ],
)
def test_mistakes_are_one_sentence(options, sentence):
    with pytest.raises(UserError) as mistake:
        choose(**options)
    assert str(mistake.value).startswith(sentence)


def test_settings_and_command_line_load_without_torch():
    check = "import sys, sail_align.align.cli, sail_align.align.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
