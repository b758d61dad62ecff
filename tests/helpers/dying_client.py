"""python client.py, which dies in the middle of a model or an update that travels in pieces.

`dying_client.py store 4 ...` dies once it has the first piece of the fourth model, `dying_client.py fetch 2 ...` once
the server has the first piece of its second update; the flags behind are client.py's.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from federation.client.session import Session


def main() -> None:
    kind, number, *flags = sys.argv[1:]
    begun, answer = 0, Session.get_properties

    def dying(self: Session, config: dict) -> dict:
        nonlocal begun
        if config["ask"] == kind and config.get("what", "update") == "update":  # not the untrained model
            begun += config["start"] == 0
            if begun == int(number) and config["start"]:
                os._exit(9)
        return answer(self, config)

    Session.get_properties = dying  # type: ignore[method-assign]
    sys.argv = ["client.py", *flags]
    runpy.run_path(str(Path(__file__).parent.parent.parent / "client.py"), run_name="__main__")


if __name__ == "__main__":
    main()
