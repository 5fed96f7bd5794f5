"""Generation: Examples without labels, with pixels for images, in; token ids out.

Its parts, lowest first:
    sampling        how the next token is chosen
    decoding        a batch being answered, seen from the host
    engine          prefill and decode over the KV cache, compiled once a bucket
    compile_cache   compiled programs kept between processes
    answer          ids to text: stop strings, text piece by piece
    request         what is asked and answered, in the user's terms
llava_jax.model puts them together.
"""

from llava_jax.generate.answer import Answer as Answer
from llava_jax.generate.decoding import Decoding as Decoding
from llava_jax.generate.decoding import Output as Output
from llava_jax.generate.engine import Generator as Generator
from llava_jax.generate.sampling import Sampling as Sampling
