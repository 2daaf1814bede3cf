"""Uploads an exported folder to the hub: privately unless told otherwise, and not at all in a dry run.

The token is the one that huggingface_hub finds (`hf auth login`, or HF_TOKEN). It is written into no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hapo_lite.errors import UserError, first_line

TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|https?://[^\s/@]+:[^\s/@]+@)")
"""What looks like a token of the hub, or like an address with a password in it."""
TEXTS = (".md", ".json", ".jinja", ".yaml")
"""Endings of the files that are looked through for tokens."""


@dataclass(frozen=True)
class Push:
    """Where an export is uploaded to. name: OWNER/NAME. public: else the repository is private. dry: only list it."""

    name: str
    public: bool = False
    dry: bool = False

    def check(self) -> None:
        """Raise UserError for a name that the hub does not take, and without a token unless nothing is uploaded."""
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise UserError(f"--push {self.name} is no name on the hub: {first_line(error)}") from None
        if "/" not in self.name:
            raise UserError(f"--push {self.name} names no owner: give OWNER/{self.name}, with your name on the hub")
        if not self.dry and huggingface_hub.get_token() is None:
            raise UserError(
                "--push needs a token of the hub that may write: run hf auth login, or set HF_TOKEN; --dry-run needs "
                "none"
            )

    def listing(self, folder: Path) -> str:
        """What is uploaded, in lines: the repository, who sees it, and each file with its size."""
        files = files_of(folder)
        seen = "public: everybody sees it" if self.public else "private: you and those you invite see it"
        total = sum(path.stat().st_size for path in files)
        lines = [f"repository {self.name}, {seen}; {len(files)} files, {total / 1e6:,.2f} MB"]
        lines += [f"  {path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}" for path in files]
        return "\n".join(lines)

    def upload(self, folder: Path) -> str:
        """Upload an exported folder, or list what would be uploaded, and return the sentence for the user.

        Raises UserError if a file holds a token, if there is such a repository with the other visibility, or if the
        hub cannot be reached or refuses.
        """
        for path in files_of(folder):
            if path.suffix in TEXTS and (found := TOKEN.search(path.read_text(encoding="utf-8", errors="replace"))):
                raise UserError(
                    f"{path} holds what looks like a token or a password ({found.group()[:6]}...): remove it"
                )
        if self.dry:
            return f"dry run, nothing is uploaded: {self.listing(folder)}"
        try:
            url = self._send(folder)
        except UserError:
            raise
        except Exception as error:  # the hub's library raises classes of several libraries
            raise UserError(
                f"{folder} is exported, and could not be uploaded to {self.name} ({type(error).__name__}: "
                f"{first_line(error)}): check the network, and that your token may write there"
            ) from error
        return f"{url}: {self.listing(folder)}"

    def _send(self, folder: Path) -> str:
        """Create the repository if there is none, and upload. Returns its address."""
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(self.name, private=not self.public, exist_ok=True)
        private = hub.repo_info(self.name).private
        if private == self.public:
            now, advice = ("private", "leave --public out") if private else ("public", "give --public")
            raise UserError(
                f"the repository {self.name} is {now} already, and an upload does not change that: {advice}, or give "
                "another name"
            )
        hub.upload_folder(repo_id=self.name, folder_path=folder, commit_message=f"Export by hapo_lite, {folder.name}")
        return str(url)


def files_of(folder: Path) -> list[Path]:
    """All files of an exported folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
