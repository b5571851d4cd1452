"""`python docs/ui_client.py [URL]`: a page of `afa ui`, called by name instead of by hand."""

import sys
from pathlib import Path

from gradio_client import Client

PROMPT = "a red star left of a blue ring on a dotted mint background"


def main() -> None:
    client = Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860", analytics_enabled=False, verbose=False)
    known = client.predict(api_name="/methods")
    experts = known["experts"]
    print("methods:", ", ".join(known["methods"]))

    # The ensemble and its first expert, from the same noise.
    pictures = client.predict(prompt=PROMPT, methods=["afa", f"expert:{experts[0]}"], seed=1, steps=20, guidance=3, api_name="/generate")
    for one in pictures:
        print(f"{one['title']}, seed {one['seed']}, {one['seconds']} s: {Path(one['image']).name}")  # image: downloaded

    # Who shaped the first picture at its tenth step, and how it was made.
    weights = client.predict(picture=pictures[0]["picture"], step=10, api_name="/weights")
    print("shares at step 10:", weights["shares"])
    again = client.predict(picture=pictures[0]["picture"], api_name="/settings")["generate"]

    # The same with the first expert at half its strength.
    weaker = client.predict(**{**again, "strengths": {experts[0]: 0.5}}, api_name="/generate")
    print(f"{experts[0]} at half: {Path(weaker[0]['image']).name}")

    # A run that is stopped; its error says so.
    run = client.submit(prompt=PROMPT, methods=list(known["methods"]), seed=2, steps=known["limits"]["steps"], api_name="/generate")
    while not client.predict(api_name="/cancel"):
        pass  # it has not begun yet
    print("stopped:", run.exception())


if __name__ == "__main__":
    main()
