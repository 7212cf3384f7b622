"""Published benchmarks, in small folders of their published form."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastav.errors import InstallationError, MissingTrack, TaskError
from fastav.registry import TASKS
from fastav.request import Use
from fastav.task import Grade, Task
from media_files import tone, write_clip

MEDIA = {".mp4": "clip.mp4", ".mkv": "clip.mp4", ".mp3": "sound.mp3", ".png": "picture.png"}
YES_NO = "Answer with yes or no."
LETTER = "Answer with the letter of the right option only."


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder with a clip with sound, one without, a sound and a picture."""
    folder = tmp_path_factory.mktemp("media")
    sound = tone(0.5, 16_000)
    write_clip(folder / "clip.mp4", frames=5, audio="aac", sound=sound)
    write_clip(folder / "silent.mp4", frames=5)
    write_clip(folder / "sound.mp3", None, audio="mp3", sound=sound)
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(folder / "picture.png")
    return folder


class Folder:
    """A benchmark's folder to write to."""

    def __init__(self, root: Path, media: Path) -> None:
        self.root, self.media = root, media

    def clips(self, *names: str, use: str | None = None) -> None:
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.media / (use or MEDIA[path.suffix]), path)

    def write(self, name: str, content: object) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def task(self, name: str) -> Task:
        return TASKS[name](self.root)


@pytest.fixture
def folder(tmp_path, media):
    return Folder(tmp_path, media)


def avqa(**changes):
    row = {
        "id": 1139,
        "video_name": "abcdefghijk_000006",
        "video_id": 1395,
        "question_text": "What makes the sound?",
        "multi_choice": ["Dog", "Cat", 3, "Car"],
        "answer": 3,
        "question_relation": "Both",
        "question_type": "Come From",
    }
    return {**row, **changes}


def music(**changes):
    row = {
        "video_id": "00000272",
        "question_id": 50,
        "type": '["Audio-Visual", "Location"]',
        "question_content": "Where is the <FL> sounding instrument?",
        "templ_values": '["first"]',
        "question_deleted": 0,
        "anser": "left",
    }
    return {**row, **changes}


def world(**changes):
    row = {
        "task_domain": "Recognition",
        "task_type": "Audio Change",
        "question": "What changes?",
        "answer": "C",
        "candidates": ["A. Tempo", "B. Key", "C. Volume"],
    }
    return {**row, **changes}


def daily(**changes):
    row = {
        "Question": "What is said when the door opens?",
        "Choice": ["A. Hello", "B. Goodbye", "C. Thanks", "D. Nothing"],
        "Answer": "B",
        "video_id": "abcdefghijk",
        "Type": "AV Event Alignment",
        "video_category": "People & Blogs",
        "video_duration": "30s",
    }
    return {**row, **changes}


def mme(**changes):
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=abcdefghijk",
        "videoID": "abcdefghijk",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many trees?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "D",
    }
    return {**row, **changes}


def omni(**changes):
    row = {
        "index": 0,
        "task type": "Action and Activity",
        "audio type": "speech",
        "question": "What are they doing?",
        "audio content": "A: Four letters.",
        "image content": "Two people on a couch.",
        "audio_path": "1_1.mp3",
        "image_path": "1_1.png",
        "answer": "A crossword.",
        "options": ["A quiz.", "A crossword.", "A race.", "A meal."],
    }
    return {**row, **changes}


def odyssey(**changes):
    row = {
        "question_id": "1_1",
        "question_type_id": "1",
        "data_type": "image and audio",
        "subfield": "Timbre",
        "question": "Is [audio1] the instrument in [img1]?",
        "options": ["A. yes", "B. no", "C. at times", "D. unclear"],
        "answer": "A",
        "image_path": ["image/1.png"],
        "audio_path": ["audio/1.mp3"],
        "video_path": None,
    }
    return {**row, **changes}


def avh(**changes):
    row = {"video_id": "00191", "task": "AV Matching", "text": "Do they match?", "label": "Yes"}
    return {**row, **changes}


EVERY = {
    "avqa": ("data/annotation/val_qa.json", [avqa()], ["data/video/abcdefghijk_000006.mp4"]),
    "music-avqa": ("data/json/avqa-test.json", [music()], ["data/video/00000272.mp4"]),
    "worldsense": ("worldsense_qa.json", {"abc": {"domain": "Music", "task0": world()}}, ["videos/abc.mp4"]),
    "daily-omni": ("qa.json", [daily()], ["Videos/abcdefghijk/abcdefghijk_video.mp4"]),
    "video-mme": ("videomme/test-00000-of-00001.parquet", [mme()], ["data/abcdefghijk.mp4"]),
    "omnibench": (
        "dataset/batch-5_1142_20240817.jsonl",
        [omni()],
        ["mm_data/image/1_1.png", "mm_data/audio/1_1.mp3"],
    ),
    "av-odyssey": ("av_odyssey.parquet", [odyssey()], ["image/1.png", "audio/1.mp3"]),
    "avhbench": ("qa.json", [avh()], ["videos/00191.mp4"]),
}


@pytest.fixture
def benchmark_of(folder):
    """The samples of a benchmark of one question, by its name."""

    def of(name: str) -> list:
        file, content, clips = EVERY[name]
        folder.write(file, content)
        folder.clips(*clips)
        return list(folder.task(name).samples())

    return of


@pytest.fixture(params=sorted(EVERY))
def benchmark(request, folder):
    """A benchmark of one question, whole."""
    file, content, clips = EVERY[request.param]
    folder.write(file, content)
    folder.clips(*clips)
    return request.param, folder


def test_every_task_that_needs_a_folder_is_here():
    assert set(EVERY) == {name for name, task in TASKS.items() if task.needs_folder}


def test_a_question_is_read_asked_and_graded(benchmark):
    name, folder = benchmark
    task = folder.task(name)
    [sample] = task.samples()
    request = sample.request()
    assert sample.use is Use.BOTH
    assert request.tracks == (True, True)
    assert request.clip.require_video().read([0]).shape[0] == 1
    assert request.question == sample.question
    assert task.grade(sample, sample.answer) == Grade(1)
    assert task.grade(sample, "") == Grade(0, parsed=False)
    report = task.report([(sample, sample.answer, Grade(1)), (sample, "", Grade(0, parsed=False))])
    assert list(report) == ["all", sample.family]
    assert report["all"].items() >= {"accuracy": 0.5, "n": 2, "unparsed": 1}.items()
    assert report["all"]["stderr"] == pytest.approx(0.5 / 2**0.5)
    assert task.report([]) == {}


def test_clips_that_are_not_there_are_counted_and_named(benchmark):
    name, folder = benchmark
    clips = EVERY[name][2]
    for clip in clips:
        (folder.root / clip).unlink()
    with pytest.raises(TaskError, match=f"{len(clips)} of {len(clips)} clips are not in .*; the first is .*") as caught:
        folder.task(name).samples()
    assert Path(clips[0]).name in caught.value.message


def test_annotations_that_cannot_be_read_are_named(benchmark):
    name, folder = benchmark
    file = folder.root / EVERY[name][0]
    file.write_bytes(b"\xff\xfe broken")
    with pytest.raises(TaskError, match=file.name):
        folder.task(name).samples()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("name", "row"), [("daily-omni", daily()), ("video-mme", mme()), ("av-odyssey", odyssey())])
def test_the_same_columns_are_read_in_any_form(folder, name, row, suffix):
    file, _, clips = EVERY[name]
    folder.write(str(Path(file).with_suffix(suffix)), [row])
    folder.clips(*clips)
    [sample] = folder.task(name).samples()
    assert folder.task(name).grade(sample, sample.answer) == Grade(1)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "[]", "3", '{"a": 1}'])
def test_what_is_no_list_of_annotations_is_refused(folder, content):
    folder.write("qa.json", content)
    with pytest.raises(TaskError, match=r"qa\.json is not"):
        folder.task("daily-omni").samples()


def test_a_bad_line_is_named_by_its_number(folder):
    path = folder.write("qa.jsonl", [daily()])
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(TaskError, match=r"line 2 of qa\.jsonl is not JSON"):
        folder.task("daily-omni").samples()


def test_without_pyarrow_it_says_what_to_install(folder, monkeypatch):
    folder.write("videomme/test-0.parquet", [mme()])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InstallationError, match="needs pyarrow") as caught:
        folder.task("video-mme").samples()
    assert "pip install '.[eval]'" in caught.value.hint


def test_a_pyarrow_that_does_not_import_says_why(folder, monkeypatch, tmp_path):
    folder.write("videomme/test-0.parquet", [mme()])
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text('raise ImportError("pyarrow requires NumPy 2.0 or newer")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyarrow")
    with pytest.raises(InstallationError, match=r"cannot be imported: pyarrow requires NumPy 2\.0 or newer") as caught:
        folder.task("video-mme").samples()
    assert "a pyarrow that fits" in caught.value.hint


MALFORMED = [
    ("avqa", avqa(answer=4), "'answer' must be an integer from 0 to 3, got 4"),
    ("avqa", avqa(answer=True), "'answer' must be an integer"),
    ("avqa", avqa(multi_choice="Dog"), "'multi_choice' must be a list of texts"),
    ("avqa", avqa(question_text=" "), "'question_text' must be text"),
    ("music-avqa", music(templ_values="[]"), "1 slots in .* and 0 values"),
    ("music-avqa", music(type="Audio"), "'type' must be a list written as text"),
    ("music-avqa", music(anser=None), "'anser' must be text, got None"),
    ("daily-omni", daily(Answer="E"), "'Answer' must be the letter of one of 4 options, got 'E'"),
    ("daily-omni", daily(Answer="AB"), "'Answer' must be the letter"),
    ("daily-omni", {"Question": "Why?"}, "there is no 'Choice' among Question"),
    ("omnibench", omni(answer="A nap."), "'answer' must be one of the options, got 'A nap.'"),
    ("av-odyssey", odyssey(audio_path=None), "'image_path' and 'audio_path' must name files"),
    ("avhbench", avh(task="Matching"), "'task' must be one of .*, got 'Matching'"),
    ("avhbench", avh(label="Maybe"), "'label' must be Yes or No, got 'Maybe'"),
]


@pytest.mark.parametrize(("name", "row", "message"), MALFORMED)
def test_a_malformed_row_is_named_with_what_is_wrong(folder, name, row, message):
    file, _, clips = EVERY[name]
    folder.write(file, [EVERY[name][1][0], row])
    folder.clips(*clips)
    with pytest.raises(TaskError, match=f"{Path(file).name}, row 2: {message}"):
        folder.task(name).samples()


@pytest.mark.parametrize("name", ["avqa", "music-avqa", "video-mme", "omnibench", "av-odyssey"])
def test_an_id_that_comes_twice_is_an_error(folder, name):
    file, content, clips = EVERY[name]
    folder.write(file, content * 2)
    folder.clips(*clips)
    with pytest.raises(TaskError, match="1 ids are repeated; the first is"):
        folder.task(name).samples()


def test_a_clip_without_sound_is_an_error_when_it_is_asked_about(folder):
    folder.write("qa.json", [daily()])
    folder.clips(*EVERY["daily-omni"][2], use="silent.mp4")
    [sample] = folder.task("daily-omni").samples()
    with pytest.raises(MissingTrack, match="no audio track"):
        _ = sample.request().tracks


def test_avqa_counts_options_from_0(benchmark_of):
    [sample] = benchmark_of("avqa")
    assert sample.id == "1139"
    assert sample.question == f"What makes the sound?\nA. Dog\nB. Cat\nC. 3\nD. Car\n{LETTER}"
    assert (sample.answer, sample.family) == ("D", "Come From")


def test_music_avqa_fills_templates_and_takes_the_updated_annotations(folder):
    rows = [
        music(),
        music(
            question_id=51,
            question_content="Is the <Object> louder than the <Object>?",
            templ_values='["flute", "drum"]',
            anser="yes",
        ),
        music(question_id=52, question_content="How many?", templ_values="[]", anser="two"),
    ]
    folder.write("data/json/avqa-test.json", [music(anser="old")])
    folder.write("data/json_update/avqa-test.json", rows)
    folder.clips("data/video/00000272.mp4")
    first, second, third = folder.task("music-avqa").samples()
    assert first.question.startswith("Where is the first sounding instrument?\n")
    assert second.question.startswith("Is the flute louder than the drum?\n")
    assert (first.answer, first.family, third.answer) == ("left", "Audio-Visual Location", "two")


@pytest.mark.parametrize(
    ("text", "score"), [("left", 1), (" Left. ", 1), ("LEFT . .", 1), ("the left", 0), ("left side", 0), ("right", 0)]
)
def test_music_avqa_is_exact_but_for_case_and_full_stops(folder, benchmark_of, text, score):
    [sample] = benchmark_of("music-avqa")
    assert folder.task("music-avqa").grade(sample, text) == Grade(score)


def test_worldsense_reads_the_authors_file_and_the_table_alike(folder):
    videos = {"abc": {"video_duration": "60s", "task0": world(), "task1": world(answer="A")}, "xyz": {"task0": world()}}
    folder.write("worldsense_qa.json", videos)
    folder.clips("videos/abc.mp4", "videos/xyz.mp4")
    ours = list(folder.task("worldsense").samples())
    assert [sample.id for sample in ours] == ["abc/task0", "abc/task1", "xyz/task0"]
    assert ours[0].options == ("Tempo", "Key", "Volume")
    assert (ours[0].answer, ours[1].answer, ours[0].family) == ("C", "A", "Audio Change")
    (folder.root / "worldsense_qa.json").unlink()
    table = [{"index": i, "video_path": f"videos/{s.clip.name}", **world(answer=s.answer)} for i, s in enumerate(ours)]
    folder.write("data/test-00000-of-00001.parquet", table)
    theirs = list(folder.task("worldsense").samples())
    assert [(s.clip, s.question, s.answer) for s in theirs] == [(s.clip, s.question, s.answer) for s in ours]
    assert [s.id for s in theirs] == ["0", "1", "2"]


def test_video_mme_takes_other_containers_and_several_files(folder):
    folder.write("videomme/test-00000-of-00002.parquet", [mme()])
    folder.write("videomme/test-00001-of-00002.parquet", [mme(question_id="002-1", videoID="xyz", duration="long")])
    folder.clips("data/abcdefghijk.mp4", "data/xyz.mkv")
    first, second = folder.task("video-mme").samples()
    assert (first.family, second.family) == ("short", "long")
    assert second.clip.suffix == ".mkv"
    assert first.question.splitlines()[1:3] == ["How many trees?", "A. One."]
    assert first.question.endswith("D. Four.\nThe best answer is:")


def test_omnibench_joins_a_picture_and_a_sound(benchmark_of):
    [sample] = benchmark_of("omnibench")
    clip = sample.request().clip
    assert (clip.require_video().frames, clip.require_video().width) == (1, 48)
    assert clip.require_audio().duration == clip.require_video().duration == pytest.approx(0.5, abs=0.1)
    assert sample.answer == "B"


def test_av_odyssey_asks_what_one_clip_can_hold(folder):
    several = odyssey(question_id="2", audio_path=["audio/1.mp3", "audio/2.mp3"])
    film = odyssey(question_id="3", data_type="video and audio", image_path=None, video_path=["video/1.mp4"])
    film["question"] = "Does [video1] go with [audio1]?"
    folder.write("av_odyssey.parquet", [odyssey(), several, film])
    folder.clips("image/1.png", "audio/1.mp3", "video/1.mp4")
    picture, video = folder.task("av-odyssey").samples()
    assert picture.question.startswith("Is the audio the instrument in the image?\nA. yes\n")
    assert video.question.startswith("Does the video go with the audio?\n")
    assert video.request().clip.require_video().frames == 5
    folder.write("av_odyssey.parquet", [several])
    with pytest.raises(TaskError, match="none of 1 questions can be asked"):
        folder.task("av-odyssey").samples()


CAPTION = "A man's dog barks, then a t-shirt falls."


def questions():
    matching = [("Yes", "yes"), ("Yes", "No."), ("No", "Yes, they do"), ("No", "maybe"), ("Yes", "YES")]
    rows = [avh(label=label) for label, _ in matching]
    rows += [avh(task="Audio-driven Video Hallucination", label="No")]
    rows += [avh(task="AV Captioning", text="Describe it.", label=CAPTION)]
    rows += [avh(task="AV Captioning", text="Describe it.", label="Rain on a roof.", video_id="00200")]
    return rows, [*(text for _, text in matching), "no", CAPTION, ""]


def test_avhbench_reports_yes_and_no_and_captions_apart(folder):
    rows, texts = questions()
    folder.write("json/00191.json", rows[:-1])
    folder.write("json/00200.json", rows[-1:])
    folder.clips("video/00191.mp4", "video/00200.mp4")
    task = folder.task("avhbench")
    samples = list(task.samples())
    assert [s.id for s in samples][-2:] == ["00191-7", "00200-1"]
    assert samples[0].question == f"Do they match?\n{YES_NO}"
    assert samples[-1].question == "Describe it."
    report = task.report([(s, text, task.grade(s, text)) for s, text in zip(samples, texts, strict=True)])
    assert list(report) == ["all", "AV Matching", "Audio-driven Video Hallucination", "AV Captioning"]
    matching = report["AV Matching"]
    assert matching.items() >= {"accuracy": 0.4, "n": 5, "unparsed": 1, "yes": 0.6}.items()
    assert matching["precision"] == matching["recall"] == matching["f1"] == pytest.approx(2 / 3)
    assert report["all"].items() >= {"accuracy": 0.5, "n": 6}.items()
    assert report["Audio-driven Video Hallucination"].items() >= {"accuracy": 1, "precision": 0, "yes": 0}.items()
    captions = report["AV Captioning"]
    assert captions.items() >= {"n": 2, "unparsed": 1}.items()
    assert captions["cider_d"] == pytest.approx(5)
    assert set(captions) == {"cider_d", "stderr", "n", "unparsed"}


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Yes", Grade(1)),
        (" yes, it is.", Grade(1)),
        ('"Yes"', Grade(1)),
        ("No", Grade(0)),
        ("no.", Grade(0)),
        ("Nothing", Grade(0, parsed=False)),
        ("Yesterday", Grade(0, parsed=False)),
        ("It does, yes", Grade(0, parsed=False)),
    ],
)
def test_the_first_word_says_yes_or_no(folder, benchmark_of, text, grade):
    [sample] = benchmark_of("avhbench")
    assert folder.task("avhbench").grade(sample, text) == grade
