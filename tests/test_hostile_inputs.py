"""Damaged and odd files through every script: success or a sentence, nothing lost, nothing written elsewhere.

`pytest -m hostile` tries all of them, the ordinary run a sample.
"""

import random
import shutil

import hostile
import pytest
from hostile_entries import ENTRIES, SCANS
from hostile_runs import chunks, run_entry

SAMPLE = 24


def inputs_of(name: str, seed: int = 0) -> list[dict[str, bytes]]:
    """What an entry is tried with: the files of each run."""
    entry = ENTRIES[name]
    files = {
        f"{number}_{file}": content
        for number, make in enumerate(entry.kinds.values())
        for file, content in make().items()
    }
    if entry.most and len(files) > entry.most:
        chosen = random.Random(f"{seed} {name}").sample(sorted(files), entry.most)
        files = {file: files[file] for file in chosen}
    return list(chunks(files, entry.together))


def test_there_are_hundreds_of_files_and_always_the_same():
    makers = [*SCANS.values(), hostile.pictures, hostile.arrays, hostile.yaml_files]
    once, twice = ([make() for make in makers] for _ in range(2))
    whole = [content for files in once for content in files.values() if isinstance(content, bytes)]
    assert len(set(whole)) >= 300
    assert whole == [content for files in twice for content in files.values() if isinstance(content, bytes)]


def sample() -> list[tuple[str, int]]:
    """An entry each, and which of its files."""
    rng = random.Random(0)
    return [(name, rng.randrange(1000)) for name in rng.sample(sorted(ENTRIES), SAMPLE)]


@pytest.mark.parametrize(("name", "number"), sample())
def test_a_sample_of_damaged_files(name, number, tmp_path):
    files = [item for part in inputs_of(name) for item in part.items()]
    assert not run_entry(ENTRIES[name], dict([files[number % len(files)]]), tmp_path)


@pytest.mark.hostile
@pytest.mark.parametrize("name", ENTRIES)
def test_every_damaged_file(name, tmp_path):
    found, inputs = {}, inputs_of(name)
    for number, files in enumerate(inputs):
        sandbox = tmp_path / str(number)
        sandbox.mkdir()
        if problems := run_entry(ENTRIES[name], files, sandbox):
            found[", ".join(files)] = problems
            print(f"{name} {', '.join(files)}: {problems}", flush=True)
        shutil.rmtree(sandbox)
    print(f"{name}: {sum(map(len, inputs))} files in {len(inputs)} runs", flush=True)
    assert not found, "\n".join(f"{files}: {line}" for files, lines in found.items() for line in lines)
