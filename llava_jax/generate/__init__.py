"""Generation: Examples without labels, with pixels for images, in; token ids out.

Its parts, lowest first:
    request         what is asked and answered, in the user's terms
    sampling        how the next token is chosen
    decoding        a batch being answered, seen from the host
    engine          prefill and decode over the KV cache, compiled once per bucket
    compile_cache   compiled programs kept between processes
    detokenize      ids to text: stop strings, text piece by piece
llava_jax.model puts them together.
"""

from llava_jax.generate.decoding import Decoding as Decoding
from llava_jax.generate.decoding import Output as Output
from llava_jax.generate.detokenize import Detokenizer as Detokenizer
from llava_jax.generate.engine import Generator as Generator
