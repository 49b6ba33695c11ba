"""Feature activations at the read-out position, by layer: read in the pass that scores the labels, stored sparse.

A prompt's *code* at a layer is what the dictionary of that layer makes of the residual stream at the read-out
position. Of some 1,500 features at most about 50 are active, so codes are kept as sparse matrices and written to one
safetensors file: all layers of a thousand prompts are a few megabytes and come back in well under a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from emosae_utils.files import (
    EmosaeError,
    atomic_folder,
    check_manifest,
    read_json,
    read_table,
    write_json,
    write_manifest,
    write_table,
)
from emosae_utils.models import LM
from emosae_utils.saes import Dictionary
from emosae_utils.scoring import FloatArray, Prompts, read_out

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Codes:
    """Feature activations of a set of prompts at the read-out position.

    Attributes:
        model: name of the model.
        layers: the layers there is a code for, ascending.
        by_layer: activations [prompts, features] by layer, float32, never negative.
        rows: one line per prompt, in the same order: what is known of its text (`row_id`, `emotion`, `topic`, ...).
        labels: the labels scored.
        scores_PE: label scores [prompts, labels], nats.
    """

    model: str
    layers: tuple[int, ...]
    by_layer: Mapping[int, csr_array]
    rows: pd.DataFrame
    labels: tuple[str, ...]
    scores_PE: FloatArray

    def __len__(self) -> int:
        return len(self.rows)

    def dense(self, layer: int) -> Array:
        """Activations of one layer as an array, [prompts, features].

        Raises:
            EmosaeError: if the layer has no code.
        """
        if layer not in self.by_layer:
            raise EmosaeError(f"there is no code for layer {layer}; there is one for {list(self.layers)}")
        dense_PF: Array = self.by_layer[layer].toarray()
        return dense_PF

    def select(self, keep_P: Sequence[bool] | Array) -> Codes:
        """The codes of some of the prompts, chosen by a mask over `rows`."""
        index_P = np.flatnonzero(np.asarray(keep_P))
        return Codes(
            self.model,
            self.layers,
            {layer: matrix[index_P] for layer, matrix in self.by_layer.items()},
            self.rows.iloc[index_P].reset_index(drop=True),
            self.labels,
            self.scores_PE[index_P],
        )


def encode_residuals(dictionaries: Mapping[int, Dictionary], resid_PLD: Array) -> dict[int, csr_array]:
    """Sparse codes by layer of residuals [prompts, layers, d_model], the layers ascending as in `dictionaries`."""
    found = {}
    for i, layer in enumerate(sorted(dictionaries)):
        codes_PF = dictionaries[layer].encode(torch.from_numpy(np.ascontiguousarray(resid_PLD[:, i])))
        found[layer] = csr_array(codes_PF.cpu().numpy())
    return found


def read_codes(
    lm: LM, prompts: Prompts, dictionaries: Mapping[int, Dictionary], rows: pd.DataFrame, *, progress: str = ""
) -> Codes:
    """Score the labels and read every dictionary's code in one pass over the prompts.

    Args:
        lm: the model.
        prompts: from `build_prompts`.
        dictionaries: by layer.
        rows: one line per prompt, in the order of `prompts`.
        progress: a caption for a progress bar; none if empty.

    Raises:
        EmosaeError: if `rows` and `prompts` differ in number.
    """
    if len(rows) != len(prompts):
        raise EmosaeError(f"{len(prompts)} prompts were given with {len(rows)} rows; give one row per prompt")
    layers = tuple(sorted(dictionaries))
    read = read_out(lm, prompts, layers=layers, progress=progress)
    assert read.resid_PLD is not None
    by_layer = encode_residuals(dictionaries, read.resid_PLD)
    return Codes(lm.name, layers, by_layer, rows.reset_index(drop=True), prompts.labels, read.scores_PE)


def save_codes(folder: Path, codes: Codes) -> None:
    """Write codes to a folder: one safetensors file, the rows as a table, and checksums."""
    from safetensors.numpy import save_file

    tensors = {"scores_PE": np.ascontiguousarray(codes.scores_PE)}
    for layer, matrix in codes.by_layer.items():
        tensors[f"{layer}.values"] = matrix.data.astype(np.float32)
        tensors[f"{layer}.features"] = matrix.indices.astype(np.int32)
        tensors[f"{layer}.starts"] = matrix.indptr.astype(np.int64)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "codes.safetensors")
        write_table(temporary / "rows.parquet", codes.rows)
        widths = {str(layer): int(matrix.shape[1]) for layer, matrix in codes.by_layer.items()}
        write_json(temporary / "codes.json", {"model": codes.model, "labels": list(codes.labels), "features": widths})
        write_manifest(temporary)


def load_codes(folder: Path) -> Codes:
    """Read codes that `save_codes` wrote.

    Raises:
        EmosaeError: if a file is missing or altered.
    """
    from safetensors.numpy import load_file

    if fault := check_manifest(folder):
        raise EmosaeError(f"the codes in {folder} cannot be read: {fault}; run the chapter that writes them again")
    facts, rows = read_json(folder / "codes.json"), read_table(folder / "rows.parquet")
    tensors = load_file(folder / "codes.safetensors")
    layers = tuple(sorted(int(layer) for layer in facts["features"]))
    by_layer = {
        layer: csr_array(
            (tensors[f"{layer}.values"], tensors[f"{layer}.features"], tensors[f"{layer}.starts"]),
            shape=(len(rows), facts["features"][str(layer)]),
        )
        for layer in layers
    }
    return Codes(facts["model"], layers, by_layer, rows, tuple(facts["labels"]), tensors["scores_PE"])
