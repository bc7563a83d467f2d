"""A child process that downloads shards with img2dataset's own engine, without its process pool, logger and wandb.

`python -m sdtrain.data.img2dataset_child REQUEST.json`: does the shards of the request in order, and
prints a JSON line on standard output after each. It ends when its standard input closes, which
happens when the process that started it dies, however that came about.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

from sdtrain.data.config import DownloadConfig
from sdtrain.data.connections import Limits
from sdtrain.data.fetch_guard import install
from sdtrain.errors import UserError

# Sites opt out by these directives, to all or to this name: img2dataset's defaults, and its name.
OPT_OUT_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]
USER_AGENT_TOKEN = "img2dataset"  # noqa: S105 - no secret
COLUMNS = ["uid", "caption", "url"]
DEADLINE_TIMEOUTS = 6
"""A whole fetch, body included, may take this many times the time-out of one answer."""
MAX_PIXELS = 2**27
"""OpenCV refuses larger pictures: a small file can hold a picture that fills the memory."""


class ShardRequest(BaseModel):
    """One shard to do: `rows` is an Arrow file with `COLUMNS`, in the order of the keys."""

    shard: int
    rows: Path


class Request(BaseModel):
    """What a child is asked to do."""

    config: DownloadConfig
    output: Path
    digits: int
    """How many digits of a key count samples within a shard."""
    shards: list[ShardRequest]


def main() -> None:
    """Does the request in the file named on the command line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # img2dataset prints; the lines for the parent must not be mixed with that.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    _download(request, reports)


def _download(request: Request, reports: object) -> None:
    # Here, because OpenCV reads its environment when it is imported.
    _leave_out_what_downloading_does_not_need()
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    config = request.config
    limits = Limits(allow_private=config.allow_private_hosts, deadline_s=DEADLINE_TIMEOUTS * config.timeout_s)
    install(limits, config.retries)
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=config.resize_only_if_bigger,
            encode_quality=config.encode_quality,
            encode_format=config.encode_format,
        ),
        thread_count=config.threads,
        save_caption=True,
        extract_exif=True,
        output_folder=str(request.output),
        column_list=COLUMNS,
        timeout=config.timeout_s,
        number_sample_per_shard=10**request.digits,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=0,  # the guard tries again, after a pause and only where that can help
        user_agent_token=USER_AGENT_TOKEN,
        disallowed_header_directives=OPT_OUT_DIRECTIVES,
    )
    for shard in request.shards:
        downloader.download_shard((shard.shard, str(shard.rows)))
        print(json.dumps({"shard": shard.shard}), file=reports, flush=True)  # type: ignore[call-overload]


def _leave_out_what_downloading_does_not_need() -> None:
    """Imports a third as long, which every child pays: 2 s of processor time and not 7."""
    # Optional for webdataset and albumentations: they do without where the import fails.
    sys.modules["torch"] = sys.modules["huggingface_hub"] = None  # type: ignore[assignment]
    # Imported by img2dataset's logger, and used only by the logger process, which does not run here.
    sys.modules["wandb"] = ModuleType("wandb")
    # The package's own __init__ brings its command line with pandas and the rest; its modules do without.
    spec = importlib.util.find_spec("img2dataset")
    if spec is None:
        raise UserError("img2dataset is not installed. Install sdtrain with its dependencies (`make setup`).")
    package = ModuleType("img2dataset")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["img2dataset"] = package


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants when the work is done.
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
