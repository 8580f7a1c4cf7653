"""benchmarks/ is no installed package: these tests need the source tree."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "benchmarks" / "noisy_labels").is_dir():
    sys.path.insert(0, str(ROOT))
else:
    collect_ignore_glob = ["test_*.py"]
