"""Traces a stage once and cuts its graph into F, B and W; `tf_impl.backward` shows the idea.

    trace.py       one graph with the stage's forward and backward
    scissors.py    which of its operations belong to F, B and W, and what crosses between them
    functions.py   the functions that a stage calls, made of the three parts
    tensors.py     small questions about graphs, tensors and their sizes

The stage y = tanh(x A) C, operation by operation in the order of the trace:

    operation                     ancestor of     belongs to    its result is
    ----------------------------  --------------  ------------  -----------------------------
    x           Placeholder       y, dA           F             an argument of F, saved for W
    A, C        ReadVariableOp    everything      repeated      read again by F and by B
    x A         MatMul            y               F
    h           Tanh              y, dx, dC       F             saved for B and W
    y           MatMul(h, C)      y               F             what F returns
    dy          Placeholder       dx, dA, dC      B             an argument of B, handed on to W
    dh          MatMul(dy, Cᵀ)    dx, dA          B
    dz          TanhGrad(h, dh)   dx, dA          B             handed on to W
    dx          MatMul(dz, Aᵀ)    dx              B             what B returns
    dA          MatMul(xᵀ, dz)    dA              W             added to A's gradient
    dC          MatMul(hᵀ, dy)    dC              W             added to C's gradient

    F(x) -> y, h, x        B(dy, h) -> dx, dz, dy        W(h, x, dz, dy)        BW(dy, h, x) -> dx

F takes all ancestors of y; B those of dx that are not in F; W those of dA and dC that are in
neither. "Saved" and "handed on" are what crosses a border: the memory of a micro-batch.

Four kinds of operations need care:

- What depends on no data (variable reads, constants, a transposed weight) is cheap and does not
  cross a border: every function that needs it repeats it. Weights are thus read where they are,
  never saved. They change only between steps.
- What has a side effect (advancing the state of Keras' dropout seed) belongs to F, and so does all
  that reads it; if it is the gradient's own, to B (`tf_impl.effects` says what has one).
- A copy, or a cast to a type of more bytes, holds nothing new: what crosses is the tensor that it
  was made from.
- A token has no gradient, so the first stage's B aims at the output of its first unit; otherwise
  everything would count as W, and the stage would have no B to speak of.

Recomputation (Chen et al. 2016; GPipe, Huang et al. 2019, section 2.3) asks nothing new of the cut:
the trace has the forward twice, and only the second one is differentiated. It is no ancestor of y,
so it falls to B, with what W alone needs of it, and all that crosses from F to B is what it starts
from. (`tf.recompute_grad` does the same, but out of sight of a B that aims into it.)

The idea of splitting the backward is the Zero Bubble paper's (Qi et al. 2024, section 2).

Differs: only TensorFlow gives a graph as data that can be cut.
"""
