"""The loop: events, cancels, callbacks, spans. Knows no concrete callback; may import `data`, nothing above.

Read in this order: `training_loop.py` (the picture), `events.py`, `spans.py`, `dispatch.py`, `callback.py`; the rooms
behind them are `ordering.py`, `interrupt.py`, `state.py` and `passes.py`.
"""
