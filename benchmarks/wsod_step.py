"""Measures the time of each part of a training step of MIST on VGG16, and its memory.

python -m benchmarks.wsod_step [--images 2] [--steps 3] [--threads N]

The images are noise of 600 x 800 pixels in JPEG files that the benchmark writes, with random proposals: 213 an image,
as WeakSAM has, and 2000, as selective search has. The whole step runs as in a training, with two threads that read and
decode ahead; `waited for data` is the time of the step without a batch. Then each part is timed separately, forward
and backward, on the same batch. Uses the GPU if there is one. Exits 1 when data are 10 % of a step or more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_pool

from weaksam.data.proposal_boxes import ProposalBoxes
from weaksam.models.backbones.roi_net import DilatedVgg16
from weaksam.models.noise import SampleNoise, make_generators
from weaksam.models.wsod.network import METHODS, WsodNet, wsod_losses
from weaksam.ops import mil
from weaksam.ops.boxes import box_iou, to_inclusive
from weaksam.training.wsod_task import WsodRecipe, WsodTask

SIZES = (213, 2000)
HEIGHT, WIDTH, CLASSES = 600, 800, 20
LARGEST_SHARE = 0.1
DECODERS = ThreadPoolExecutor(8)


class Clock:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time of a block, after the GPU has finished."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_task(folder: Path, num: int, images: int) -> WsodTask:
    """Writes `images` noisy JPEG files and returns a task with `num` proposals in each."""
    rng = np.random.default_rng(num)
    uris = []
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8))
        uris.append(str(folder / f"{num}_{i}.jpg"))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(uris[-1], quality=90)
    corners = rng.random((images * num, 2)) * (WIDTH - 260, HEIGHT - 260)
    boxes = np.concatenate([corners, corners + 30 + rng.random((images * num, 2)) * 220], 1).astype(np.float32)
    starts = np.arange(images + 1) * num
    packed = ProposalBoxes(
        boxes, np.ones(len(boxes), np.float32), starts, np.full((images, 2), (HEIGHT, WIDTH), np.int32)
    )
    labels = np.zeros((images, CLASSES), bool)
    labels[:, [2, 7]] = True
    return WsodTask(make_net, uris, labels, lambda: packed, WsodRecipe(scales=(HEIGHT,)))


def make_net() -> WsodNet:
    """Returns MIST as published with random weights, which do not change the time."""
    torch.manual_seed(0)
    return WsodNet(DilatedVgg16(last_relu=False), CLASSES, METHODS["mist"])


def load(task: WsodTask, step: int, images: int, device: torch.device) -> dict[str, Tensor]:
    """Loads a batch."""
    batch = task.load_batch(np.arange(images), np.stack([np.full(images, step), np.arange(images)], 1), DECODERS)
    return {key: value.to(device) for key, value in batch.items()}


def whole_steps(task: WsodTask, net: WsodNet, images: int, steps: int, clock: Clock) -> None:
    """Times steps as the training loop takes them, with batches prepared ahead."""
    optimizer = task.build_optimizer(net, lr=1e-5, weight_decay=5e-4)
    with ThreadPoolExecutor(2) as loaders:
        queue = [loaders.submit(load, task, step, images, clock.device) for step in range(2)]
        for step in range(steps + 1):
            timed = clock if step else Clock(clock.device)  # the first warms up
            with timed.time("step"):
                with timed.time("waited for data"):
                    batch = queue.pop(0).result()
                queue.append(loaders.submit(load, task, step + 2, images, clock.device))
                (task.loss(net, batch)[0] / images).backward()
                optimizer.step()
                optimizer.zero_grad()


def step_in_parts(task: WsodTask, net: WsodNet, images: int, clock: Clock) -> None:
    """Times one step with every part detached from the part before, so that its backward is timed separately."""
    optimizer = task.build_optimizer(net, lr=1e-5, weight_decay=5e-4)
    with clock.time("data (read, decode, resize)"):
        batch = load(task, 0, images, clock.device)
    boxes = [batch[f"boxes/{i}"] for i in range(images)]
    noise = SampleNoise(
        make_generators(batch["seed"].tolist(), clock.device), [len(image_boxes) for image_boxes in boxes]
    )
    with clock.time("backbone"):
        maps = [net.roi_net.features(net.roi_net.normalise(batch[f"image/{i}"])) for i in range(images)]
    cut_maps = [feature_map.detach().requires_grad_() for feature_map in maps]
    with clock.time("pooling"):
        rois = [to_inclusive(image_boxes) for image_boxes in boxes]
        pooled = torch.cat([roi_pool(item, [roi], (7, 7), 1 / 8) for item, roi in zip(cut_maps, rois, strict=True)])
    cut_pooled = pooled.detach().requires_grad_()
    with clock.time("heads"):
        outputs = net.heads(cut_pooled, [len(image_boxes) for image_boxes in boxes], noise)
    for i, output in enumerate(outputs):  # timed alone, to know its share of the losses
        with clock.time("mining"):
            scores = mil.wsddn_scores(output.cls, output.det).detach()[:, 1:]
            iou = box_iou(boxes[i], boxes[i])
            for _ in output.refine:
                mil.assign(iou, mil.mine_mist(iou, scores, batch[f"present/{i}"]))
    with clock.time("losses, mining included"):
        sums = [
            sum(wsod_losses(output, boxes[i], batch[f"present/{i}"], net.rules).values())
            for i, output in enumerate(outputs)
        ]
    with clock.time("heads"):
        torch.stack(sums).mean().backward()  # pyright: ignore[reportArgumentType, reportCallIssue]
    with clock.time("pooling"):
        pooled.backward(cut_pooled.grad)
    with clock.time("backbone"):
        torch.autograd.backward(maps, [feature_map.grad for feature_map in cut_maps])
    with clock.time("optimiser"):
        optimizer.step()


def measure(num: int, images: int, steps: int, threads: int, answer: Callable[[float], None]) -> None:
    """Prints a table for `num` proposals; calls `answer` with the share of data in a step."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, clock, parts = make_net().to(device).train(), Clock(device), Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), num, images)
        whole_steps(task, net, images, steps, clock)
        step_in_parts(task, net, images, Clock(device))
        step_in_parts(task, net, images, parts)
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    step, share = clock.seconds["step"] / steps, clock.seconds["waited for data"] / clock.seconds["step"]
    print(
        f"{num} proposals, {images} image(s) of {HEIGHT} x {WIDTH}: step {step:.2f} s, waited for data {share:.1%}, "
        f"peak memory {peak / 2**30:.2f} GiB"
    )
    for name, seconds in parts.seconds.items():
        print(f"  {name:28} {seconds:8.3f} s")
    answer(share)


def main() -> None:
    """Measures each size in a separate process, because peak memory is counted per process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{options.threads} thread(s)"
    print(f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}")
    context, shares = multiprocessing.get_context("spawn"), []
    for num in SIZES:
        answers = context.SimpleQueue()
        child = context.Process(target=measure, args=(num, options.images, options.steps, options.threads, answers.put))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(child.exitcode)
        shares.append(answers.get())
    sys.exit(int(max(shares) >= LARGEST_SHARE))


if __name__ == "__main__":
    main()
