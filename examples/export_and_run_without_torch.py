"""Export a model as ONNX files, and caption in a process that cannot import torch.

The export needs more packages, once: pip install 'diptych[export]'. Running the files does not.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from diptych import Captioner, export

PHOTO = Path(__file__).parent / "photos" / "coffee.jpg"
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing either now fails
from diptych import Captioner
print(Captioner.load(sys.argv[1]).caption(sys.argv[2]).text)
"""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="default")
parser.add_argument("--out", type=Path, help="keep the ONNX files in this folder")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    folder = arguments.out or Path(temporary) / "exported"
    report = export(arguments.model, folder)
    print(f"{len(report)} entries in export.json")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")
    print("with torch:   ", Captioner.load(arguments.model, runtime="torch").caption(PHOTO).text)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(PHOTO)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print("without torch:", done.stdout.strip())
