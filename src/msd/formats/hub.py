"""Draft heads on the hub: a folder with a model card is written, uploaded by the official client, and loaded by its id.

Without a connection (`HF_HUB_OFFLINE=1`) loading takes what was downloaded before, and uploading is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.formats.card import CARD, card
from msd.formats.folder import HUB_ID, WEIGHTS, local
from msd.formats.load import check
from msd.system.files import check_place, make_folder, write_whole


def save_pretrained(head: Path | str, folder: Path | str, target: str | None = None, repo: str | None = None) -> Path:
    """Writes a head, ours or published, with its weights unchanged and a model card to `folder`; returns the folder.

    A card that the head has is kept. target: the model that it drafts for, a hub id, for the card. repo: its own hub
    id, by default the name of the folder. UserError names the first fault of the head.
    """
    source, folder, found = local(head), Path(folder), check(head)
    if found.faults:
        raise UserError(f"head '{head}' of format {found.format} has faults: {found.faults[0]}; see 'msd check {head}'")
    check_place(folder, folder=True)
    make_folder(folder)
    record = checkpoint.training(source)
    weights = next(files for pattern in WEIGHTS if (files := sorted(source.glob(pattern))))
    for file in (source / checkpoint.CONFIG, *weights):
        write_whole(folder / file.name, file.read_bytes())
    if record:
        checkpoint.save_training(folder, _without_paths(record))
    own = source / CARD
    if own.is_file():
        text = own.read_text(encoding="utf-8")
    else:
        text = card(found.format, found.config, record, repo or folder.name, target)
    write_whole(folder / CARD, text)
    return folder


def push_to_hub(head: Path | str, repo: str, target: str | None = None, private: bool | None = None) -> str:
    """Uploads a head, ours or published, with a model card to the hub; returns the address of the commit.

    repo: its hub id, "user/name"; it is created if it is not there. The official client takes the token from its login
    or from HF_TOKEN. UserError for a head with faults, and if the hub refuses it.
    """
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"'{repo}' is no hub id; give USER/NAME")
    with TemporaryDirectory() as place:
        save_pretrained(head, place, target, repo)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            commit: Any = api.upload_folder(repo_id=repo, folder_path=place, commit_message="Draft head and model card")
        except Exception as error:  # those of the client's HTTP library, which differs by version, among others
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise UserError(f"the hub did not take '{repo}' ({reason})") from error
    return str(commit)


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a training record that names the start drafter without the folders of this machine."""
    start = (record.get("settings") or {}).get("start")
    if start is None or (HUB_ID.fullmatch(start) and not Path(start).exists()):
        return record
    copy: dict[str, Any] = json.loads(json.dumps(record))
    copy["settings"]["start"] = Path(start).name
    return copy
