"""The file of an evaluation: what is kept, mended and refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastav.errors import FastAVError
from fastav.evaluate import Row, open_rows, read

RUN = {
    "task": "t",
    "model": "m",
    "device": "cpu",
    "dtype": "float32",
    "plans": {"none": {"fingerprint": "0", "steps": []}, "half": {"fingerprint": "1", "steps": ["..."]}},
    "families": ["a"],
    "limit": None,
}


def row(sample: str, plan: str = "none", **changes) -> Row:
    saving = {"full": 10, "pruned": 5}
    return Row(
        task="t",
        sample=sample,
        family="a",
        plan=plan,
        fingerprint=RUN["plans"][plan]["fingerprint"],
        gold="x",
        **{"answer": "y\n\u2028ü", "score": 0.5, "parsed": True, "flops": saving, "kv_bytes": saving} | changes,
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_rows(path, RUN) as file:
        for sample in "12":
            for plan in RUN["plans"]:
                file.append(row(sample, plan))
    return path


def test_rows_come_back_as_they_were(path):
    stored = read(path)
    assert stored.runs == (RUN,)
    assert stored.rows == (row("1"), row("1", "half"), row("2"), row("2", "half"))


def test_a_file_of_version_1_is_read_and_goes_on(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    entries[0]["fastav_eval"] = 1
    for entry in entries[1:]:
        del entry["kl"]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    assert read(path).rows == (row("1"), row("1", "half"), row("2"), row("2", "half"))
    with open_rows(path, RUN) as file:
        file.append(row("3", kl={"mean": 0.5, "max": 1.0}))
    assert read(path).rows[-1].kl == {"mean": 0.5, "max": 1.0}


def test_a_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_rows(path, RUN) as file:
        assert read(path).rows == ()
        file.append(row("1"))
        assert read(path).rows == file.rows == (row("1"),)


def test_another_run_adds_to_the_file_and_says_who_it_is(path):
    later = RUN | {"limit": 7, "commit": "abc"}
    with open_rows(path, later) as file:
        assert len(file.rows) == 4
        file.append(row("3"))
        assert file.results.runs == (RUN, later)
    assert read(path).runs == (RUN, later)
    assert len(read(path).rows) == 5


def test_the_last_row_of_a_sample_and_plan_counts(path):
    with open_rows(path, RUN) as file:
        file.append(replace(row("1"), score=1))
        assert len(file.rows) == 4
    assert next(r for r in read(path).rows if r.key == ("1", "none")).score == 1


def test_a_file_cut_anywhere_goes_on_with_its_whole_lines(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        with open_rows(path, RUN) as file:
            assert len(file.rows) == max(0, lines - 1)
            file.append(row("9"))
        assert len(read(path).rows) == max(0, lines - 1) + 1
        assert path.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])


def test_a_cut_file_can_be_read_while_it_grows(path):
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read(path).rows) == 3


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"task": "other"}, "of the task 't', not 'other'"),
        ({"model": "other"}, "of the model 'm', not 'other'"),
        ({"device": "cuda:0"}, "of the device 'cpu'"),
        ({"dtype": "bfloat16"}, "of the dtype"),
        ({"plans": {"none": RUN["plans"]["none"]}}, "differ in half"),
        ({"plans": RUN["plans"] | {"half": {"fingerprint": "2", "steps": []}}}, "differ in half"),
        ({"plans": RUN["plans"] | {"more": {"fingerprint": "3", "steps": []}}}, "differ in more"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(path, change, found):
    before = path.read_bytes()
    with pytest.raises(FastAVError, match=found), open_rows(path, RUN | change):
        pytest.fail("opened")
    assert path.read_bytes() == before


def test_one_gpu_is_as_good_as_another(tmp_path):
    path = tmp_path / "rows.jsonl"
    for device in ("cuda:0", "cuda:1", "cuda"):
        with open_rows(path, RUN | {"device": device}):
            pass
    assert len(read(path).runs) == 3


@pytest.mark.parametrize("content", [b"a novel", b"a novel\nin two lines\n", b'{"a": 1}\n', b"\n", bytes(100)])
def test_any_other_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "novel.txt"
    path.write_bytes(content)
    with pytest.raises(FastAVError, match=r"is not a file of rows"), open_rows(path, RUN):
        pytest.fail("opened")
    with pytest.raises(FastAVError, match=r"is not a file of rows"):
        read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b"{}",
        b"3",
        b'{"fastav_eval": 2}',
        b'{"fastav_eval": 4, "task": "t", "model": "m", "device": "cpu", "dtype": "d", "plans": {}, "families": []}',
        json.dumps({**row("1").__class__.__dataclass_fields__.fromkeys(["kl"])}).encode(),
        b'{"fastav_eval": 1}',
        b"\xff",
        json.dumps({**row("1").__class__.__dataclass_fields__.fromkeys(["task"])}).encode(),
    ],
)
def test_a_broken_line_is_refused_by_its_number(path, line):
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(FastAVError, match=r"line 6 of .* cannot be read"):
        read(path)


def test_an_empty_file_is_a_new_one_but_has_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    with pytest.raises(FastAVError, match="has no rows"):
        read(path)
    with open_rows(path, RUN) as file:
        assert file.rows == ()
    assert read(path).runs == (RUN,)


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(FastAVError, match=r"cannot read .*No such file"):
        read(tmp_path / "no.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_raises():
    from pathlib import Path

    with pytest.raises(OSError, match="No space left"), open_rows(Path("/dev/full"), RUN):
        pytest.fail("opened")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_leaves_a_file_that_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    script = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from unit.test_evaluate_rows import RUN, open_rows, row\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "with open_rows(Path(sys.argv[1]), RUN) as file:\n"
        "    for number in range(100): file.append(row(str(number)))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, capture_output=True, text=True)
    assert "File too large" in done.stderr
    data = path.read_bytes()
    assert len(data) == 2000
    with open_rows(path, RUN) as file:
        assert len(file.rows) == data.count(b"\n") - 1 > 1
        file.append(row("new"))
    assert read(path).rows[-1] == row("new")
