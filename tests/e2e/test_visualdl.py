"""The VisualDL page opens with our pinned versions and draws the loss of a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException
from selenium.webdriver.common.keys import Keys

from helpers import make_flags, run_program

CURVE = np.asarray([41, 50, 225])  # the colour VisualDL gives the first run


@pytest.fixture(scope="module")
def logdir(tmp_path_factory, tiny_model) -> Path:
    """A short run that logs to VisualDL."""
    folder = tmp_path_factory.mktemp("run")
    words = make_flags(
        model_name_or_path=tiny_model, output_dir=folder / "out", max_steps=30, learning_rate=3e-3, logging_steps=1,
        src_length=32, tgt_length=16, do_train=1, do_eval=1, eval_steps=10, do_generation=1, max_evaluate_steps=1,
        save_strategy="no",
    )  # fmt: skip
    result = run_program("finetune_generation.py", *words)
    assert result.returncode == 0, result.stderr
    return folder / "out"


@contextlib.contextmanager
def server(logdir: Path) -> Iterator[str]:
    """Run visualdl --logdir on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("visualdl")
    command = [
        str(program),
        "--logdir",
        str(logdir),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--language",
        "en",
        "--disable-telemetry",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def browser(folder: Path) -> Iterator:
    """Headless Chromium."""
    chromium = next(
        (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
    )
    driver = shutil.which("chromedriver")
    assert chromium and driver, "this test needs Chromium and its driver: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,900",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
    ):  # fmt: skip
        options.add_argument(flag)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


def screenshot(window) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")).astype(int)


def typed(window, text: str) -> bool:
    """Type the text into the tag filter; False while the page is missing or redrawing."""
    try:
        for box in window.find_elements("css selector", "input[placeholder*='Search tags']"):
            if box.get_attribute("value") != text:
                box.send_keys(Keys.CONTROL, "a")
                box.send_keys(text)
            return box.get_attribute("value") == text
    except (StaleElementReferenceException, ElementNotInteractableException):
        pass
    return False


def test_the_page_shows_the_loss_curve(logdir, tmp_path):
    with server(logdir) as address, browser(tmp_path / "profile") as window:
        window.get(f"{address}/app/scalar")
        deadline = time.monotonic() + 180
        while not typed(window, "^train/loss$"):
            assert time.monotonic() < deadline, "the page did not come up"
            time.sleep(0.5)
        blue, drawn = np.zeros((1, 1), bool), []
        while time.monotonic() < deadline and not (blue.sum() > 200 and len(drawn) == 1):
            time.sleep(1)
            with contextlib.suppress(StaleElementReferenceException):
                typed(window, "^train/loss$")
                drawn = [c for c in window.find_elements("tag name", "canvas") if c.size["width"] > 100]
            blue = np.abs(screenshot(window)[150:, :1100] - CURVE).sum(axis=2) < 60
        columns, lines = np.flatnonzero(blue.any(axis=0)), np.flatnonzero(blue.any(axis=1))
        assert len(drawn) == 1, "one chart is asked for"
        # a falling curve: as wide as the chart, and lower on the right than on the left
        assert columns.max() - columns.min() > 250 and lines.max() - lines.min() > 50
        left, right = (np.flatnonzero(blue[:, c - 5 : c + 5].any(axis=1)).mean() for c in (columns[10], columns[-10]))
        assert right > left + 30


def ask(address: str, path: str):
    with urllib.request.urlopen(f"{address}/app/api/{path}", timeout=30) as answer:
        return json.loads(answer.read())["data"]


def test_scalars_texts_and_hyperparameters_are_logged(logdir):
    with server(logdir) as address:
        (run,) = ask(address, "runs")
        (scalars,) = ask(address, "scalar/tags")["tags"]
        names = "loss learning_rate grad_norm tokens_per_second tokens_per_second_per_device tflops_per_device memory_peak_gb"
        assert {f"train/{name}" for name in names.split()} | {"eval/loss", "eval/exact_match"} <= set(scalars)
        assert set(ask(address, "text/tags")["tags"][0]) == {"config", "samples"}
        assert "hyper_parameters" in ask(address, "components")
        points = ask(address, f"scalar/list?{urllib.parse.urlencode({'run': run, 'tag': 'train/loss'})}")
        assert [point[1] for point in points] == list(range(1, 31))


def test_a_resumed_run_shows_its_whole_curve(logdir, tmp_path, tiny_model):
    """VisualDL reads only the newest file of a folder."""
    words = make_flags(
        model_name_or_path=tiny_model, output_dir=tmp_path, max_steps=6, logging_steps=1, save_steps=3, src_length=32,
        tgt_length=16, do_train=1,
    )  # fmt: skip
    assert run_program("finetune_generation.py", *words).returncode == 0
    shutil.rmtree(tmp_path / "checkpoint-6")
    result = run_program("finetune_generation.py", *words)
    assert result.returncode == 0 and "checkpoint-3" in result.stdout, result.stderr
    with server(tmp_path) as address:
        (run,) = ask(address, "runs")
        points = ask(address, f"scalar/list?{urllib.parse.urlencode({'run': run, 'tag': 'train/loss'})}")
        assert [point[1] for point in points] == [1, 2, 3, 4, 5, 6]
