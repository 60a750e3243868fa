"""`python -m lab.bench`: every benchmark takes its own options and no others."""

from inspect import signature

import pytest

from lab.bench import __main__ as bench
from lab.cli import BadInput


@pytest.fixture
def parsed(monkeypatch):
    def parse(*words):
        monkeypatch.setattr("sys.argv", [bench.__file__, *words])
        return bench.parse_args()

    return parse


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "required: BENCHMARK"),
        (("nothing",), "invalid choice: 'nothing'"),
        (("profile", "--recipes", "w4"), "unrecognized arguments: --recipes w4"),
        (("engines", "--epochs", "3"), "unrecognized arguments: --epochs 3"),
        (("train", "--data-dir", "data"), "unrecognized arguments: --data-dir data"),
        (("engines", "--checkpoint", ""), "--checkpoint is empty"),
        (("--output", "", "engines"), "--output is empty"),
        (("abuse", "--kills", "-1"), "--kills: -1 is not a whole number"),
    ],
)
def test_what_does_nothing_is_refused_in_one_line(words, says, parsed, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and err.count("\n") == 1
    assert err.startswith("lab.bench")


@pytest.mark.parametrize("what", bench.OF_SPEED)
@pytest.mark.parametrize("model", ["resnet18", "vit_cifar", "ssdlite_mobilevit_xxs"])
def test_speeds_of_training_are_mobilevits(what, model, parsed):
    assert parsed(what, "--model", "s").model == "mobilevit_s"
    with pytest.raises(BadInput, match=f"lab.bench {what} is for MobileViT, not for {model}"):
        parsed(what, "--model", model)


@pytest.mark.parametrize("what", bench.BENCHMARKS)
def test_help_says_what_acts_there(what, parsed, capsys):
    for words in (("--help",), (what, "--help")):
        with pytest.raises(SystemExit, match="0"):
            parsed(*words)
        assert bench.ABOUT[what] in " ".join(capsys.readouterr().out.split())
    args = parsed(what, "--output", "there")
    assert vars(args).keys() - {"what", "output"} == set(
        signature(bench.BENCHMARKS[what]).parameters
    )
    assert args == parsed("--output", "there", what) != parsed(what)
