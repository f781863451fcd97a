"""What the parent hands to a worker, jobs in a JSON file, and back: files in each job's folder.

progress.jsonl        lines as they happen, from the process that holds device 0 (read by the progress bar)
not-finite-<device>.json   the first tensor of this process that was not finite, where the job was to stop at one
part-<device>.json    one `Part` per process, named after its first device
part-<device>.safetensors   step 0's gradients; for a probe also activations, one optimizer step, trained weights
evaluation.json, generation.json   what inference found, from the process that holds device 0
failed-<device>.txt   the traceback, where a job failed
line-<n>/             the same files from the processes of line n (`common.spec.mesh`), from 1 on; line 0 is the run that reports show
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common.io.bounded import read_text
from common.io.edges import OsText, write_file
from common.schedule import generators
from common.spec.mesh import Mesh
from common.spec.run import RunConfig, explain


class _Told(BaseModel):
    """What a parent tells a worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Saving(_Told):
    """Where and how often a job saves checkpoints (`common.checkpoint`); its last step always."""

    directory: OsText
    every: int | None
    keep: int
    token: str
    """Of this job alone: part of its temporary folders' names."""
    depot: OsText | None = None
    """Where shards go if the process of device 0 has another folder (`common.checkpoint.depot`)."""


class Generation(_Told):
    """What a job generates (`runtime.inference`)."""

    prompt: tuple[int, ...]
    tokens: int
    """New ones, for each sample."""
    samples: int = 1
    temperature: float | None = None
    """None: greedy, or beam search."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_beams: int | None = None
    """None: no beam search."""
    length_penalty: float = 1.0
    early_stopping: Literal["no", "yes", "never"] = "no"
    eos: int | None = None
    """The token that ends a sequence."""


class JobText(_Told):
    """The text of a job as its parent has read it (`runtime.text`)."""

    tokens: OsText
    """The file of all tokens (.npy)."""
    digest: str
    """SHA-256 of the text."""
    num_bytes: int
    tokenizer: OsText | None
    """The tokenizer.json; None for bytes."""


class Job(_Told):
    """One run to do in a worker process."""

    config: RunConfig
    out: OsText
    """The job's folder; the parent makes it."""
    board: OsText | None = None
    """The folder of the board that its devices are watched by (`runtime.watch`); None: `out`."""
    kind: Literal["train", "probe", "dump", "evaluate", "generate"] = "train"
    """probe: also write the tensors of the parity ladder. dump: those of the step after `stop_at`
    (`runtime.dumping`). evaluate, generate: train nothing (`runtime.inference`).
    """
    noise: float = 0.0
    """Added to the weights, times standard normal: in a test no bias is 0 and no norm weight 1."""
    text: JobText | None = None
    """None if nothing reads text; `launch` adds it to jobs without one."""
    resume: OsText | None = None
    """The checkpoint to continue from."""
    weights_alone: bool = False
    """Whether only its weights are used: training starts at step 0."""
    stop_at: int | None = None
    """Steps done when the job ends; default: all of the specification."""
    saving: Saving | None = None
    fault: str | None = None
    """A fault to inject (`common.runtime.faults`)."""
    must_be_finite: bool = False
    """Whether the job ends at the first loss or gradient norm that is not finite."""
    batches: int | None = None
    """evaluate: mini-batches of the held-out text; default: all of it."""
    generation: Generation | None = None
    line: int = 0
    """Which one's the job is (`of_line`)."""
    in_one_process: bool = False
    """Whether the worker computes all replicas itself, as the oracle does."""

    def of_line(self, line: int) -> Job:
        """Return the job as a line's processes do it: those after the first write into folders of
        their own, and no checkpoint. The shards of replica 0 join the weights of one, so they keep
        `saving` and hand over theirs.
        """
        if line == 0:
            return self
        # A fault is made once, in line 0; checkpoints are written by the shards of replica 0 alone.
        own = {"line": line, "out": str(self.folders[line]), "fault": None}
        if line >= Mesh.of(self.config).shards:
            own["saving"] = None
        return self.model_copy(update=own)

    @property
    def folders(self) -> list[Path]:
        """The folder of every line; the first is the job's own."""
        out = Path(self.out)
        lines = 1 if self.in_one_process else Mesh.of(self.config).lines
        return [out, *(out / f"line-{n}" for n in range(1, lines))]


class JobFile(_Told):
    """All jobs of one worker process; they share framework, device and number of stages."""

    jobs: tuple[Job, ...]
    schedules: dict[OsText, str] = {}
    """The texts of schedules in files, by path, as the parent read them."""

    @classmethod
    def read(cls, path: str | Path) -> JobFile:
        """Read a job file. Raises ValueError of one line if it cannot be read or holds no job."""
        try:
            file = cls.model_validate_json(read_text(Path(path)))
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; expected a readable file of jobs"
            ) from None
        except ValidationError as error:
            raise ValueError(f"{path}: {'; '.join(explain(error).splitlines())}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}; expected a file of jobs") from None
        if not file.jobs:
            raise ValueError(f"{path}: no job in it; expected at least one")
        generators.kept.update(file.schedules)
        return file

    def write(self, path: str | Path) -> None:
        """Add the texts of the jobs' schedules that this process keeps."""
        # The parent has read every schedule's file once. A worker takes its text from here, so that
        # a file that changes meanwhile changes nothing.
        paths = {str(Path(job.config.schedule.removeprefix("file:"))) for job in self.jobs}
        texts = {path: text for path, text in generators.kept.items() if path in paths}
        write_file(
            Path(path), self.model_copy(update={"schedules": texts}).model_dump_json(indent=1)
        )


class EventRecord(BaseModel):
    """One executed action with its times, in seconds of the monotonic clock."""

    action: str
    ready_seconds: float
    start_seconds: float
    end_seconds: float


class StepRecord(BaseModel):
    """One optimizer step as one process saw it."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a loss that diverged is a result too

    step: int
    loss: float
    gradient_norm: float
    seconds: float
    events: dict[int, list[EventRecord]]
    """By device."""


class Part(BaseModel):
    """What one worker process of a run reports."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    devices: tuple[int, ...]
    line: int = 0
    steps: list[StepRecord]
    held_out_loss: float
    """NaN where nothing was evaluated."""
    build_seconds: float
    peak_memory_bytes: dict[int, int]
    held_activation_peak_bytes: dict[int, int] = {}
    """By device; empty if the executor does not count it (`Engine.held_bytes_peak`)."""
    in_flight_peak: dict[int, int] = {}
    """By device; empty if the executor does not count it (`Engine.in_flight_peak`)."""
    environment: dict[str, Any]
    corpus_digest: str
    corpus_bytes: int
    tokenizer_digest: str = ""
    """Empty for bytes."""
