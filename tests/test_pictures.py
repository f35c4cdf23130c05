"""lib/pictures.py: what is drawn stands where the numbers say, in the house style."""

import numpy as np
import pytest

from lib import pictures


class Bytes:
    """A tokenizer of bytes."""

    tokens = [bytes([i]) for i in range(256)]

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def entry(score, stderr=0.03, baseline=0.25):
    return dict(score=score, stderr=stderr, baseline=baseline)


ROWS = [dict(step=i, loss=6 / i**0.2, lr=1.0, tokens_per_s=900.0) for i in range(1, 61)]
for row in ROWS[9::10]:
    row["val_loss"] = row["loss"] - 0.3

# steps of reinforcement, two of which were measured
WATCHED = ("reward", "length", "entropy", "kl", "signal", "drift", "truncated")
REINFORCED = [dict(step=i) | {name: i / 10 for name in WATCHED} for i in range(1, 9)]
for row in REINFORCED[3::4]:
    row |= dict(pass_1=0.5, pass_1_stderr=0.1, pass_2=0.6, pass_8=0.7, greedy=0.8)

DRAWN = {
    "compression": lambda: pictures.compression({"prose": dict(ours=4.0, GPT2=4.4)}),
    "token_lengths": lambda: pictures.token_lengths([1, 2, 3, 40], [1, 1, 2]),
    "coloured_tokens": lambda: pictures.coloured_tokens(Bytes(), "a b\nc\t" + "x" * 200),
    "training_curves": lambda: pictures.training_curves(ROWS),
    "masks": lambda: pictures.masks((4, 4, 16), 16),
    "attention_maps": lambda: pictures.attention_maps(["a", "\n"], [np.eye(2)[None]] * 2),
    "surprise": lambda: pictures.surprise(Bytes(), list(b"ab\nc"), [0.5, 3, 9, 17]),
    "bits_by_kind": lambda: pictures.bits_by_kind(
        {"base": {"kinds": {"code": dict(bpb=1.2, stderr=0.1, bytes=900)}}}
    ),
    "fine_tuning": lambda: pictures.fine_tuning({"mid": ROWS, "sft": ROWS}),
    "reinforcement": lambda: pictures.reinforcement(REINFORCED),
    "scores": lambda: pictures.scores({"base": {"sums": entry(0.3)}, "sft": {"sums": entry(0.9)}}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_is_a_file_and_its_legends_have_no_frames(name, tmp_path, capsys):
    figure = DRAWN[name]()
    legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
    assert not any(legend.get_frame_on() for legend in legends)
    pictures.show(figure, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "x.png" in capsys.readouterr().out


def test_curves_are_smoothed_and_steps_are_whole():
    for figure in pictures.training_curves(ROWS), pictures.fine_tuning({"mid": ROWS}):
        raw, smooth, validation = figure.axes[0].lines
        assert list(raw.get_ydata()) == [row["loss"] for row in ROWS]
        assert list(smooth.get_ydata()) == pictures.running_mean([row["loss"] for row in ROWS])
        assert list(validation.get_xdata()) == [10, 20, 30, 40, 50, 60]
    few = pictures.fine_tuning({"mid": ROWS[:3]})
    assert all(tick == int(tick) for tick in few.axes[0].get_xticks())


def test_running_mean_by_hand():
    values = [1.0, 2.0, 6.0, 3.0, 3.0]
    # half a neighbourhood is one value: the ends have two, the others three
    assert pictures.running_mean(values, share=2) == pytest.approx([1.5, 3.0, 11 / 3, 4.0, 3.0])
    assert pictures.running_mean(values) == values
    assert pictures.running_mean([]) == []


def test_bars_are_as_long_as_scores_and_guessing_is_marked():
    axis = DRAWN["scores"]().axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([30, 90])
    # the errors' caps are lines too
    marks = [line for line in axis.lines if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in marks] == [[25, 25], [25, 25]]


def test_tokens_are_whole_in_a_row_and_every_line_ends():
    rows, colours = pictures._fill_rows([("abc", 1), ("de\n", 2), ("fghi", 3)], columns=4)
    assert rows == ["abc", "de↵", "fghi"]
    assert colours == [[1, 1, 1], [2, 2, 2], [3, 3, 3, 3]]
    # only one that is longer than a row is cut
    assert pictures._fill_rows([("a", 1), ("bcdefg", 2)], columns=4)[0] == ["a", "bcde", "fg"]


def test_surprise_goes_from_blue_through_white_to_red():
    expected, neutral, shock = (np.array(pictures.surprise_colour(b)) for b in (0, 4, 16))
    assert expected[2] > expected[0] and shock[0] > shock[2]
    assert neutral == pytest.approx([1, 1, 1])
    assert pictures.surprise_colour(40) == pictures.surprise_colour(16)
    drawn = DRAWN["surprise"]().axes[0]
    assert "16+" in "".join(text.get_text() for text in drawn.texts)


def test_the_last_bar_holds_all_longer_tokens():
    axis = pictures.token_lengths([1, 21, 40], [1, 1, 1, 2]).axes[0]
    assert [bar.get_height() for bar in axis.patches][-1] == pytest.approx(200 / 3)


def test_ranges_of_bits_are_two_standard_errors_on_each_side():
    axis = DRAWN["bits_by_kind"]().axes[0]
    ((left, right),) = [
        segment[:, 0] for bars in axis.containers for segment in bars[2][0].get_segments()
    ]
    assert (left, right) == pytest.approx((1.2 - 2 * 0.1, 1.2 + 2 * 0.1))


def test_masks_show_what_each_kind_of_layer_sees():
    """Counted by hand: 16 queries, themselves and 4 keys before each, or all of the past."""
    figure = pictures.masks((4, 4, 16, 99), 16)
    short, long = (axis.images[0].get_array() for axis in figure.axes)
    assert short.sum() == 5 * 16 - (4 + 3 + 2 + 1) and long.sum() == 16 * 17 / 2
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["window 4: layers 0, 1", "window 16: layers 2, 3"]


def test_everything_that_is_watched_has_a_curve():
    figure = pictures.reinforcement(REINFORCED)
    steps = [row["step"] for row in REINFORCED]
    for axis, name in zip(figure.axes, WATCHED[:-1]):
        raw, *_ = axis.lines
        assert list(raw.get_xdata()) == steps
        assert list(raw.get_ydata()) == [row[name] for row in REINFORCED]
    reward, signal = figure.axes[0], figure.axes[4]
    measured = {line.get_label(): list(line.get_xdata()) for line in reward.lines[2:]}
    assert measured == {name: [4, 8] for name in ("greedy", "pass@1", "pass@8")}
    cut = signal.lines[-1]
    assert list(cut.get_ydata()) == pictures.running_mean([row["truncated"] for row in REINFORCED])
