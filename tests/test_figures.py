"""figures.py: ticks are plain numbers, files appear complete, tables line up."""

import csv
import io

import pytest

import figures
from configurator import UserError


def test_a_figure_is_written_in_the_format_of_its_suffix_and_closed(tmp_path):
    plt = figures.pyplot()
    for name, start in (("new/a.png", b"\x89PNG"), ("b.pdf", b"%PDF")):
        figure, axis = plt.subplots()
        axis.plot([1, 2], [1.2, 7])
        figures.log_ticks(axis.yaxis)
        figures.save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert [tick.get_text() for tick in axis.get_yticklabels() if 1 <= tick.get_position()[1] <= 8] == [
        "1", "1.5", "2", "3", "4", "5", "6", "8"]
    assert axis.get_yscale() == "log" and axis.get_xscale() == "linear" and not plt.get_fignums()
    with pytest.raises(UserError, match=r"c\.txt.*FIGURE\.png"):
        figures.save_figure(plt.figure(), tmp_path / "c.txt")
    plt.close("all")
    assert not (tmp_path / "c.txt").exists()


def test_tables_and_numbers():
    assert figures.table(["ids", "loss"], [["gpt2", "3.25"], ["a", "10.5"]]) == [
        "ids   loss", "gpt2  3.25", "a     10.5"]
    assert [figures.short_number(n) for n in (512, 4096, 50257, 0.5)] == ["512", "4k", "50,257", "0.5"]
    rows = [{"a": 1, "b": "x,y"}, {"a": float("nan"), "b": ""}]
    assert list(csv.DictReader(io.StringIO(figures.csv_bytes(rows).decode()))) == [
        {"a": "1", "b": "x,y"}, {"a": "", "b": ""}]
