"""
What the tests share: the repository's root on the path, and ways to make files and settings.

    python -m pytest                                  # everything, from the root
    python -m pytest tests/test_prepare.py -k chat    # some of it
"""
import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def write(tmp_path):
    """write('a.jsonl', records) -> path: a file in the format its name says, or of the bytes given."""
    def write(name, content):
        path = tmp_path / name
        if name.endswith('.parquet') and not isinstance(content, bytes):
            import pyarrow
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
            return str(path)
        if not isinstance(content, bytes):
            lines = ''.join(json.dumps(record) + '\n' for record in content)
            content = (json.dumps(content) if name.endswith('.json') else lines).encode()
            content = gzip.compress(content) if name.endswith('.gz') else content
        path.write_bytes(content)
        return str(path)
    return write


@pytest.fixture
def settings(tmp_path):
    """settings(dataset, name=value, ...): what prepare() takes, with bytes for tokens and nothing cut."""
    def settings(dataset, **changed):
        return SimpleNamespace(**dict(
            dataset=dataset, split='', tokenizer='byte', template='', max_length=2000, max_prompt_length=1000,
            truncation='cut', val_fraction=0.0, bad_records='error', label_from_scores=False,
            data_dir=str(tmp_path / 'data')) | changed)
    return settings


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's tokenizer; where its tables cannot be had, the test is skipped."""
    import prepare
    try:
        return prepare.get_tokenizer('gpt2')
    except prepare.InputError as e:
        pytest.skip(str(e))
