"""What `fkv run` generates: prompts from the command line, from files, or a script of switches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray

from forcing_kv.export.request.flags import flags, panel
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.bundle.prompt_file import read_prompts
from forcing_kv.runtime_trt.bundle.schema import load_as, parse_json
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.tools.run.encode_prompt import EncoderOptions, encode_texts, read_lines

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _Entry:
    """One line of a script.

    Raises:
        InputError: it gives no prompt, or two.
    """

    frame: int
    prompt: str | None = None
    prompt_file: str | None = None
    index: int = 0
    """Which prompt of the file."""

    def __post_init__(self) -> None:
        if self.frame < 0 or self.index < 0:
            raise InputError("frame and index must be integers from 0 on")
        if (self.prompt is None) == (self.prompt_file is None):
            raise InputError("give one of prompt and prompt_file")


@dataclass(frozen=True)
class Switch:
    """One prompt of a video, and from which latent frame on it holds."""

    frame: int
    """0 for the first; a switch takes effect at the first chunk that starts at or after it."""
    text: str
    embeds: Float32
    """[text_len, text_dim]."""


@flags(panel("Prompt (one of these)"))
@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """How prompts were given; exactly one of the first four is set."""

    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """What to generate."""
    prompts: Path | None = None
    """Text file: a prompt, and so a video, a line."""
    prompt_file: Annotated[Path | None, Parameter(alias="--prompt-embeds")] = None
    """Encoded prompts: of `fkv encode-prompt`, .npz or .npy."""
    script: Path | None = None
    """Prompt switches, a JSON object a line: `{"frame": 12, "prompt": "..."}`; frames are latent
    frames."""
    text_encoder: str | None = None
    """Folder of the text encoder, for prompts as text."""

    def videos(
        self, manifest: Manifest, announce: Callable[[int], object] = lambda _: None
    ) -> list[list[Switch]]:
        """For each video its prompts, in order, the first at frame 0.

        Args:
            announce: told the number of videos, before a text encoder takes its time.

        Raises:
            InputError: what is missing or wrong.
        """
        given = [self.prompt, self.prompts, self.prompt_file, self.script]
        if sum(value is not None for value in given) != 1:
            raise InputError("give one of --prompt, --prompts, --prompt-file and --script")
        if self.prompt_file is not None:
            texts, embeds = _fitting_embeds(self.prompt_file, manifest)
            announce(len(texts))
            return [[Switch(0, text, array)] for text, array in zip(texts, embeds, strict=True)]
        if self.script is not None:
            announce(1)
            return [self._script(manifest, self.script)]
        lines = [self.prompt] if self.prompt is not None else read_lines(self.prompts or Path())
        announce(len(lines))
        embeds = self._encode(manifest, lines, self.prompts)
        return [[Switch(0, text, array)] for text, array in zip(lines, embeds, strict=True)]

    def _script(self, manifest: Manifest, path: Path) -> list[Switch]:
        entries = _read_script(path)
        texts = [entry.prompt for entry in entries if entry.prompt is not None]
        encoded = iter(self._encode(manifest, texts, path)) if texts else iter(())
        switches = []
        for entry in entries:
            if entry.prompt is not None:
                switches.append(Switch(entry.frame, entry.prompt, next(encoded)))
                continue
            file, index = path.parent / (entry.prompt_file or ""), entry.index
            names, embeds = _fitting_embeds(file, manifest)
            if not 0 <= index < len(names):
                raise InputError(f"{path}: {file} holds {len(names)} prompts; index is {index}")
            switches.append(Switch(entry.frame, names[index], embeds[index]))
        return switches

    def _encode(
        self, manifest: Manifest, texts: Sequence[str], path: Path | None = None
    ) -> Float32:
        """Embeddings of texts; errors name the file that they come from, if they do."""
        try:
            return self._embeds(manifest, texts)
        except InputError as error:
            raise error if path is None else InputError(f"{path}: {error}") from error

    def _embeds(self, manifest: Manifest, texts: Sequence[str]) -> Float32:
        if manifest.text_encoder == "digits":
            return encode_texts(texts, EncoderOptions()).embeds
        if self.text_encoder is None:
            raise InputError(
                f"this bundle's text encoder is {manifest.text_encoder}; give its folder with "
                "--text-encoder, or encode the prompts beforehand with `fkv encode-prompt` and "
                "give --prompt-file"
            )
        text_len = manifest.config.model.text_len
        encoder = EncoderOptions(text_encoder=self.text_encoder, text_len=text_len)
        return encode_texts(texts, encoder).embeds


def _fitting_embeds(path: Path, manifest: Manifest) -> tuple[tuple[str, ...], Float32]:
    """Texts and embeddings [prompts, text_len, text_dim] of a file, of the size a bundle takes.

    Raises:
        InputError: unreadable, or encoded for another model.
    """
    content = read_prompts(path)
    size = content.embeds.shape[1:]
    model = manifest.config.model
    needed = (model.text_len, model.text_dim)
    if size != needed:
        found, wanted = ("x".join(map(str, each)) for each in (size, needed))
        raise InputError(
            f"{path}: embeddings of {found}, but this bundle takes {wanted}; encode the prompts "
            f"with its text encoder, {manifest.text_encoder}"
        )
    return content.prompts, content.embeds


def _read_script(path: Path) -> list[_Entry]:
    """Entries of a script, checked, in order of frames."""
    entries: list[_Entry] = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            content = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}: entry {number} is not JSON ({error})") from error
        entries.append(_read_entry(content, f"{path}: entry {number}"))
    frames = [entry.frame for entry in entries]
    if frames[0] != 0 or frames != sorted(set(frames)):
        raise InputError(
            f"{path}: the frames are {frames}; they must begin with 0 and grow from entry to entry"
        )
    return entries


def _read_entry(content: Any, where: str) -> _Entry:
    example = '{"frame": 12, "prompt": "..."} or {"frame": 12, "prompt_file": "p.safetensors"}'
    try:
        return load_as(_Entry, content)
    except InputError as error:
        raise InputError(f"{where}: {error}; write {example}") from error
