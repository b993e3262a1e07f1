"""What TensorBoard is given: layout, settings with outcomes, codebooks, compute and memory; traces on demand."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from benchmarks.tokenizer_cost import convolutions
from pipelines import train_tokenizer
from pipelines.stage import Stage
from tests.boards import board, charts_shown, empty_charts
from tests.ranks import free_port, run_ranks
from tests.recipes import tiny_recipe
from tests.test_pixels import pixels
from tests.test_vae import vae
from tests.training_helpers import clock_run, one_process
from vqscale.config.layout import RunLayout
from vqscale.files import write_json
from vqscale.training.build import build_tokenizer
from vqscale.training.dashboard import VARIED, layout, leaves
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.tasks import charts
from vqscale.training.tracing import Tracer
from vqscale.training.utilisation import compute_figures, forward_flops, memory_figures, named_peak

PATIENCE_S = 120
"""For each thing that a page has to show: of two cores it may get little."""
OFFLINE = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
"""No name is looked up: a page must not wait for a network that is not there."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer that was trained for some steps, two of them traced."""
    run = clock_run(tmp_path_factory.mktemp("shown") / "run", tokenizer__training__log_every=2)
    where = RunLayout(run)
    write_json(where.trace_request("tokenizer"), {"steps": 2})
    with pytest.MonkeyPatch.context() as patch, one_process(patch) as ranks:
        train_tokenizer.main(Stage("tokenizer", where, where.read_recipe(), ranks, 1))
    return run


def plugin(events: EventAccumulator, tag: str, name: str) -> bytes:
    content: bytes = events.SummaryMetadata(tag).plugin_data.content
    assert events.SummaryMetadata(tag).plugin_data.plugin_name == name
    return content


def test_a_training_is_shown_whole(shown: Path) -> None:
    events = board(shown)
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    assert {"speed/tflops", "memory/process", "speed/data_wait", "optim/gradient_norm"} <= scalars
    rates = [events.Scalars(f"speed/{name}_per_second")[-1].value for name in ("images", "tokens")]
    assert rates[1] == pytest.approx(rates[0] * (4 * 4 + 2 * 2), rel=1e-5), "the codes of both levels"
    assert "speed/share_of_peak" not in scalars, "no peak is known of a CPU: nothing is shown, and no 0"
    assert {"images/input_and_reconstruction", "images/levels", "codes/top", "codes/bottom"} <= images
    assert events.Scalars("speed/tflops")[-1].value > 0
    text = events.Tensors("machine/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "share of peak: n/a" in text


def test_the_layout_names_tags_that_are_there(shown: Path) -> None:
    assert list(charts_shown(shown)) == ["tokenizer", "optimizer", "speed"]
    assert not empty_charts(shown, "tokenizer")


@pytest.mark.parametrize(
    ("overrides", "own_losses"),
    [
        pytest.param({}, {"reconstruction", "commitment_top", "commitment_bottom"}, id="vqvae2"),
        pytest.param(vae(), {"bits_per_dim", "reconstruction"}, id="vae"),
        pytest.param(pixels(), set(), id="pixels"),
    ],
)
def test_no_chart_mixes_the_losses_of_the_stages(overrides: dict[str, Any], own_losses: set[str]) -> None:
    recipe = tiny_recipe(**overrides)
    own = charts(recipe, "prior")
    losses = {"tokenizer": own_losses, "prior": {level.name for level in recipe.levels}}
    every = {f"loss/{name}" for name in {"total"}.union(*losses.values())}
    assert list(layout(own, "prior")) == [stage for stage in losses if losses[stage]] + ["optimizer", "speed"]
    for stage in losses:
        shown = {tag for chart in own[stage].values() for tag in every if any(re.match(one, tag) for one in chart[1])}
        assert shown == {f"loss/{name}" for name in losses[stage]}


def test_a_chart_says_that_labels_are_smoothed() -> None:
    own = charts(tiny_recipe(prior__label_smoothing=0.1), "prior")
    assert list(own["prior"]) == ["nats a code, training, of smoothed labels", "nats a code, held out"]
    assert list(charts(tiny_recipe(), "prior")["prior"]) == ["nats a code, training", "nats a code, held out"]


def test_what_takes_no_step_has_no_charts_of_steps() -> None:
    own = charts(tiny_recipe(), "prior")
    untrained = layout(own, "prior", trained=False)
    assert list(untrained) == ["tokenizer", "prior"]
    assert untrained["tokenizer"] == own["tokenizer"], "it was trained"
    assert list(untrained["prior"]) == ["nats a code, held out"]
    assert not layout({"tokenizer": {}}, "tokenizer", trained=False)


def test_settings_stand_beside_what_came_of_them(shown: Path) -> None:
    events = board(shown)
    began = plugin_data_pb2.HParamsPluginData.FromString(plugin(events, "_hparams_/session_start_info", "hparams"))
    settings = began.session_start_info.hparams
    recipe = RunLayout(shown).read_recipe()
    assert settings["tokenizer.training.learning_rate"].number_value == recipe.tokenizer.training.learning_rate
    assert settings["prior.networks.0.kind"].string_value == "transformer", "the same settings in every stage"
    assert settings["resources.strategy"].string_value == "ddp"
    told = plugin_data_pb2.HParamsPluginData.FromString(plugin(events, "_hparams_/experiment", "hparams"))
    assert {setting.name for setting in told.experiment.hparam_infos if setting.differs} == set(VARIED)
    metrics = {metric.name.tag for metric in told.experiment.metric_infos}
    shown_here = metrics & set(events.Tags()["scalars"])
    assert shown_here == {"validation/mse", "validation/psnr"}, "the table shows the last value of these curves"


def test_codebooks_are_there_for_the_projector(shown: Path) -> None:
    folder = shown / "tensorboard" / "tokenizer"
    config = (folder / "projector_config.pbtxt").read_text()
    recipe = RunLayout(shown).read_recipe()
    for level in recipe.tokenizer.levels:
        assert f"codebook_{level.name}" in config
        table = next(folder.glob(f"*/codebook_{level.name}/tensors.tsv")).read_text().splitlines()
        assert len(table) == level.codes
    labels = next(folder.glob("*/codebook_top/metadata.tsv")).read_text().splitlines()
    assert labels[0] == "code\tassignments"


def test_a_trace_is_written_once_it_is_asked_for(shown: Path) -> None:
    where = RunLayout(shown)
    (trace,) = where.traces("tokenizer").glob("*.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::convolution" in names
    assert "aten::convolution" in trace.with_name("step-1.txt").read_text()
    assert not where.trace_request("tokenizer").exists()


def test_a_trace_that_is_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    request = tmp_path / "trace.json"
    tracer = Tracer(request, tmp_path / "traces")
    tracer.look(1)
    assert tracer.step() is None, "nobody has asked"
    write_json(request, {"steps": 2})
    tracer.look(2)
    assert tracer.step() is None
    tracer.close()
    assert request.exists(), "the next attempt writes it"
    assert not (tmp_path / "traces").exists()


def test_operations_of_a_forward_equal_the_formula() -> None:
    settings = tiny_recipe()
    network, size = build_tokenizer(settings.tokenizer).eval(), settings.data.image_size
    counted = forward_flops(network, torch.zeros(1, 3, size, size))
    dims = [level.dim for level in settings.tokenizer.levels]
    assert counted == sum(layer.flops for layer in convolutions(network.shapes, dims, size))


def test_attention_and_recurrences_count_on_a_cpu_too() -> None:
    query = torch.zeros(1, 2, 16, 8)
    assert forward_flops(F.scaled_dot_product_attention, query, query, query, is_causal=True) == 2 * 2 * 2 * 16 * 16 * 8
    for cell, gates in ((torch.nn.LSTM(8, 8), 4), (torch.nn.GRU(8, 8), 3)):
        assert forward_flops(cell, torch.zeros(5, 2, 8)) == 5 * 2 * gates * 2 * 2 * 8 * 8


def test_shares_of_a_peak() -> None:
    assert named_peak("NVIDIA H100 PCIe") == 756.0
    assert named_peak("NVIDIA H100 80GB HBM3") == 989.0
    assert named_peak("NVIDIA L4") == 121.0
    assert named_peak("NVIDIA L40S") == 362.0
    assert named_peak("Some Card") is None
    figures = compute_figures(2e9, 100.0, peak=0.5)
    assert figures == {"speed/tflops": pytest.approx(0.2), "speed/share_of_peak": pytest.approx(0.4)}
    assert "speed/share_of_peak" not in compute_figures(2e9, 100.0, None)


def test_memory_is_what_the_kernel_says() -> None:
    found = memory_figures(torch.device("cpu"))["memory/process"]
    said = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said
    assert found == pytest.approx(int(said[1]) / 2**20, rel=0.05)


def test_leaves_of_settings() -> None:
    tree = {"a": 1, "b": {"c": True, "d": None}, "e": [{"f": "x"}, {"f": "y"}]}
    assert dict(leaves(tree)) == {"a": 1, "b.c": True, "e.0.f": "x", "e.1.f": "y"}
    assert list(layout({}, "tokenizer")) == ["optimizer", "speed"]
    more = set(layout({}, "prior", world=2, peak=True)["speed"]) - set(layout({}, "prior")["speed"])
    assert len(more) == 3, "the share of the peak, and two of the ranks"


def _time_of_all_reduces(run: Path) -> dict[str, float]:
    with process_group("cpu", 60) as ranks:
        return _trained(run, ranks)


def _trained(run: Path, ranks: Ranks) -> dict[str, float]:
    where = RunLayout(run)
    train_tokenizer.main(Stage("tokenizer", where, where.read_recipe(), ranks, 1))
    events = board(run) if ranks.first else None
    names = [tag for tag in events.Tags()["scalars"] if "all_reduce" in tag] if events else []
    return {name: events.Scalars(name)[-1].value for name in names} if events else {}


@pytest.mark.dist
def test_all_reduces_are_timed(tmp_path: Path) -> None:
    run = clock_run(tmp_path / "run", resources__processes=2, tokenizer__training__log_every=2)
    found, _ = run_ranks(2, _time_of_all_reduces, run)
    assert 0 <= found["speed/all_reduce_exposed_s"] <= found["speed/all_reduce_s"]
    assert found["speed/all_reduce_s"] > 0


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """A server over a log directory; its address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        limit = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                    if json.load(answer):
                        break
            except (URLError, OSError):
                pass
            assert server.poll() is None, "TensorBoard has ended"
            assert time.monotonic() < limit, "TensorBoard does not answer"
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


def colourful(png: bytes) -> int:
    """Pixels that are not grey: of a chart its curves, since axes, grid and words are grey."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=2) > 60).sum())


def wait_until(true: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < limit, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def page(shown: Path) -> Iterator[Any]:
    """A headless browser before a TensorBoard of the run; `page.open(tab)` turns to a tab of it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with tensorboard(shown / "tensorboard") as address, playwright.sync_playwright() as started:
        window = started.chromium.launch(executable_path=browser, args=OFFLINE, timeout=PATIENCE_S * 1000)
        page = window.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE_S * 1000)
        page.open = lambda tab: page.goto(f"{address}/#{tab}", wait_until="commit")
        yield page
        window.close()


@pytest.mark.browser
def test_the_custom_layout_has_curves(page: Any) -> None:
    page.open("custom_scalars")
    for title in ("loss", "held-out PSNR", "share of codes used", "perplexity", "dead codes"):
        page.get_by_text(title, exact=True).first.wait_for()
    charts = page.locator("vz-line-chart2")
    wait_until(lambda: charts.count() >= 6, "six charts")
    wait_until(lambda: colourful(charts.first.screenshot()) > 20, "the first chart has no curve")


@pytest.mark.browser
def test_the_pictures_are_there(page: Any) -> None:
    page.open("images")
    for tag in ("images/input_and_reconstruction", "images/levels", "codes/top", "codes/bottom"):
        page.get_by_text(tag, exact=True).first.wait_for()
    loaded = "all => all.filter(one => one.complete && one.naturalWidth > 16).length"
    wait_until(lambda: page.locator("img").evaluate_all(loaded) >= 4, "four pictures")
    assert colourful(page.locator("img").first.screenshot()) > 100


@pytest.mark.browser
def test_histograms_texts_and_settings_are_there(page: Any) -> None:
    page.open("histograms")
    page.get_by_text("top/assignments", exact=True).first.wait_for()
    wait_until(lambda: colourful(page.locator("vz-histogram-timeseries").first.screenshot()) > 100, "a histogram")
    page.open("text")
    page.get_by_text("share of peak: n/a").first.wait_for()
    page.get_by_text("image_size: 16").first.wait_for()
    page.open("hparams")
    page.locator("vaadin-grid").get_by_text("tokenizer").first.wait_for()
    page.locator("vaadin-grid").get_by_text("tokenizer.training.learning_rate").first.wait_for()
