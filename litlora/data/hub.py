"""The data sets that are known by name, fetched from the Hugging Face hub where it can be reached."""

from __future__ import annotations

import logging
from pathlib import Path

from litlora.errors import InputError
from litlora.metrics import say

# Stanford's own repository on the hub has no JSON file any more; the cleaned set in the same shape is what the
# articles' toolkit downloads too. LIMA is gated: its page asks for an account.
HUB_FILES = {
    "alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
    "lima": ("GAIR/lima", "train.jsonl"),
    "dolly": ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"),
}


def fetch(data: str) -> Path:
    """The file of a named data set, downloaded once into the hub's own cache.

    Raises InputError, saying which file to get and how to pass it, where that fails.
    """
    repo, name = HUB_FILES[data]
    from huggingface_hub import hf_hub_download

    say(f"data: {name} of {repo}, from the hub or its cache")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try, of which there are many
    try:
        return Path(hf_hub_download(repo_id=repo, filename=name, repo_type="dataset"))
    except Exception as error:  # no common base class: HTTP, gated, offline, disk
        raise InputError(
            f"the data set {data} could not be fetched from the hub",
            where=f"dataset {repo}",
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix=f"get {name} from huggingface.co/datasets/{repo} and give it as --data_path FILE",
        ) from error
