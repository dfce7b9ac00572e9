from support.feedback_examples import judged, screened

from guardloop.mining.mine import mine
from guardloop.mining.settings import MiningSettings


def test_replayed_responses_are_mostly_to_prompts_whose_targets_moved():
    rows = [screened(f"{'moved' if n < 40 else 'still'} {n}", -6.0) for n in range(400)]
    table = [judged(row, 0, 6.0 if row["id"].startswith("moved") else -30.0) for row in rows]
    examples = mine(rows, table, MiningSettings(held_out=0)).examples
    drawn = [row["id"] for row in examples if row["kind"] == "replay_response"]
    assert len(drawn) == 200 and sum(id.startswith("moved") for id in drawn) > 35  # by chance alone some 20 of the 40
