"""Settings: presets, bounds, options without effect, and everything derived from their declarations."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.settings import PRESETS, SETTINGS, FitSettings, check_options, choose_settings, settings_table
from sail_align.extract.errors import UserError


def choose(rows=5_000_000, image_dim=2048, text_dim=1024, **options):
    check_options(options)
    return choose_settings(options, rows=rows, image_dim=image_dim, text_dim=text_dim)


def test_defaults_are_the_papers():
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
        warmup=0.1,
        batch_size=36_864,
        steps=round(100 * 5_000_000 / 36_864),
        seed=0,
    )
    assert notes == ["Using --preset paper for 5,000,000 pairs; pass --preset small for the other defaults."]


def test_preset_paper_trains_as_long_as_the_released_schedule():
    """Lion moves each weight by the rate, so the sum of the rates is how far training can go."""

    def reach(settings):
        return sum(settings.learning_rate(step) for step in range(settings.steps))

    released = FitSettings(steps=6_700, warmup=0.1)  # 100 epochs of CC3M at a batch of 32,768
    assert reach(released) == pytest.approx(0.0335, rel=0.01)
    ours, _ = choose(rows=2_200_000)
    assert reach(ours) == pytest.approx(reach(released), rel=0.15)  # a batch of 36,864 has fewer steps


def test_runs_of_the_former_preset_resume_with_its_values():
    settings, _ = choose(epochs=50, warmup=0)
    assert settings == FitSettings(warmup=0.0, steps=round(50 * 5_000_000 / 36_864))
    assert choose(head="cca")[0].warmup == choose(rows=2_000)[0].warmup == 0


def test_few_pairs_get_the_small_preset_and_a_note():
    settings, notes = choose(rows=2_000)
    assert (settings.start, settings.dim, settings.batch_size) == ("closed-form", 256, 512)
    assert settings.image_dropout == PRESETS["small"]["image_dropout"]
    assert choose(rows=2_000, head="cca", image_power=0.5)[0].image_power == 0.5
    assert notes == ["Using --preset small for 2,000 pairs; pass --preset paper for the other defaults."]


@pytest.mark.parametrize(
    ("rows", "preset", "head"),
    [
        (2, "small", "linear"),
        (9_999, "small", "linear"),
        (10_000, "medium", "glu"),
        (99_999, "medium", "glu"),
        (100_000, "paper", "glu"),
    ],
)
def test_preset_depends_on_the_number_of_pairs(rows, preset, head):
    settings, notes = choose(rows=rows)
    assert (settings.head, settings.start == "random") == (head, preset == "paper")
    assert choose(rows=rows, preset=preset)[0] == settings
    assert notes[0].startswith(f"Using --preset {preset} for {rows:,} pairs; ")


def test_hidden_units_need_a_head_that_has_them():
    with pytest.raises(UserError, match="--expansion has no effect with --head linear, the default for 2,000 pairs"):
        choose(rows=2_000, expansion=2)
    assert choose(rows=2_000, expansion=2, head="glu")[0].expansion == 2


def test_few_steps_suffice_after_a_closed_form_start():
    assert not any("hardly learn" in note for note in choose(rows=2_000, preset="small", steps=10)[1])


def test_paper_settings_on_few_pairs_warn_of_an_untrained_run():
    settings, notes = choose(rows=2_000, preset="paper")
    assert settings.batch_size == 2_000
    assert notes[0] == "Reduced the batch size from 36,864 to all 2,000 pairs."
    assert notes[1] == (
        "100 steps at a learning rate of 1e-05 change no weight by more than 0.0005. The run will hardly learn; raise "
        "--lr or --steps."
    )


def test_options_override_the_preset():
    settings, notes = choose(rows=2_000, preset="small", lr=1e-3, steps=100, batch_size=100, dim=64)
    assert (settings.lr, settings.steps, settings.batch_size, settings.dim) == (1e-3, 100, 100, 64)
    assert notes == []


def test_closed_form_has_at_most_256_dimensions():
    assert choose(head="cca")[0].dim == 256
    assert choose(start="closed-form")[0].dim == 256
    assert choose(head="cca", text_dim=100)[0].dim == 100
    assert choose(head="cca")[0].steps == 0


def test_automatic_temperature_implies_automatic_bias():
    assert choose(temperature="auto")[0].bias == "auto"
    assert choose(temperature="auto", preset="small")[0].bias == "auto"
    assert choose(temperature="auto", bias=-3.0)[0].bias == -3.0
    assert choose(bias="auto")[0].temperature == 20.0
    assert [check_options({"bias": text}) for text in (None, "auto", "-3")] == [{}, {"bias": "auto"}, {"bias": -3.0}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "gru"}, "--head is invalid: got 'gru', expected linear, mlp, glu, cca, pcca."),
        ({"preset": "big"}, "--preset is invalid: got 'big', expected paper, medium, small."),
        ({"lr": -1e-3}, "--lr is invalid: got -0.001, expected 1e-09 to 1."),
        ({"lr": float("nan")}, "--lr is invalid: got nan, expected 1e-09 to 1."),
        ({"lr": "abc"}, "--lr is invalid: got 'abc', expected 1e-09 to 1."),
        ({"lr": "1e400"}, "--lr is invalid: got inf, expected 1e-09 to 1."),
        ({"steps": "1.5"}, "--steps is invalid: got '1.5', expected 1 to 1,000,000,000."),
        ({"seed": "9" * 5_000}, f"--seed is invalid: got '{'9' * 100}', expected 0 to 2,147,483,647."),
        ({"held_out": 0.9}, "--held-out is invalid: got 0.9, expected 0 to 0.5."),
        ({"batch_size": 1}, "--batch-size is invalid: got 1, expected 2 to 1,000,000."),
        (
            {"head": "cca", "lr": 1e-3},
            "--lr has no effect with --head cca. Leave one of them out.",
        ),
        (
            {"head": "linear", "expansion": 8},
            "--expansion has no effect with --head linear. Leave one of them out.",
        ),
        ({"image_power": 0.0}, "--image-power is invalid: got 0, expected 0.1 to 1."),
        ({"temperature": 0.5}, "--temperature is invalid: got 0.5, expected auto, 1 to 100."),
        ({"bias": "low"}, "--bias is invalid: got 'low', expected auto, -100 to 100."),
        ({"loss": "infonce", "bias": 0.0}, "--bias has no effect with --loss infonce. Leave one of them out."),
        (
            {"loss": "infonce", "temperature": "auto"},
            "--temperature auto is for the sigmoid loss. Give a number with",
        ),
        ({"head": "cca", "bias": "auto"}, "--bias has no effect with --head cca."),
        ({"ridge": 3.0}, "--ridge has no effect with --start random. Leave one of them out."),
        (
            {"loss": "infonce", "divisor": "batch"},
            "--divisor has no effect with --loss infonce. Leave one of them out.",
        ),
        ({"steps": 5, "epochs": 5.0}, "--epochs has no effect with --steps. Leave one of them out."),
        (
            {"head": "cca", "dim": 2000},
            "--dim is invalid: got 2000, but a closed form of features with 2048 and 1024 dimensions has at most 1024.",
        ),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(UserError) as mistake:
        choose(**options)
    assert str(mistake.value).startswith(message)


def test_documentation_has_the_table_of_settings():
    assert settings_table() in (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_fit_has_an_option_for_each_setting():
    text = CliRunner().invoke(app, ["fit", "--help"]).output
    for setting in SETTINGS.values():
        assert f"\n  {setting.flag} " in text
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Data", "Heads", "Loss", "Optimiser", "Run", "Options"]


def test_settings_and_command_line_import_no_torch():
    check = "import sys, sail_align.align.cli, sail_align.align.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (2_000, {}, 1_536),
        (999, {}, 0),
        (999, {"text_hidden": 64}, 64),
        (2_000, {"head": "pcca"}, 1_536),
        (2_000, {"head": "glu"}, 0),
        (2_000, {"start": "random"}, 0),
        (20_000, {}, 0),
    ],
)
def test_hidden_units_of_texts_by_size_and_head(rows, options, expected):
    assert choose(rows=rows, **options)[0].text_hidden == expected


@pytest.mark.parametrize(
    ("rows", "options"), [(20_000, {}), (2_000, {"preset": "medium"}), (200_000, {"head": "linear"})]
)
def test_hidden_units_without_effect_are_refused(rows, options):
    with pytest.raises(UserError, match="--text-hidden has no effect with the defaults for"):
        choose(rows=rows, text_hidden=512, **options)


def test_hidden_units_of_texts_allow_a_larger_dim():
    assert choose(rows=2_000, dim=1_500)[0].dim == 1_500
    with pytest.raises(UserError, match=r"--dim is invalid: got 1500, .* has at most 1024"):
        choose(rows=2_000, dim=1_500, text_hidden=0)


def test_defaults_can_depend_on_another_number_of_pairs():
    dims = {"image_dim": 1_280, "text_dim": 384}
    fold, _ = choose_settings({}, rows=700, size=1_200, **dims)
    assert fold.text_hidden == choose_settings({}, rows=1_200, **dims)[0].text_hidden == 1_536
    assert fold.steps == choose_settings({}, rows=700, **dims)[0].steps
