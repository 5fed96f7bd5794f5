"""Generation: Examples without labels, with pixels for images, in; token ids out.

Its parts, lowest first:
    request         what is asked and answered, in the user's terms
    sampling        how the next token is chosen
    state           what the compiled programs share, take and give
    begin           the program that chooses an answer's first token
    adapters        LoRA adapters beside the model, unmerged
    weights         parameters as the programs take them, and back
    generator       parameters, and the programs over a slot cache
    lookup          prompt lookup: several guessed tokens checked at once
    detokenize      ids to text: stop strings, text piece by piece
    constrain       answers in JSON: which tokens may come next
    job             one request inside the engine
    pictures        whose features are on the device
    engine          continuous batching: which program runs next, for whom
    many            many requests, with the pixels of few in memory
    beam            beam search
    conversation    an answer as it comes, and turns that build on each other
    direct          prompts of ids and pixels, without text
    compile_cache   compiled programs kept between processes
llava_jax.model puts them together.
"""

from llava_jax.generate.detokenize import Detokenizer as Detokenizer
from llava_jax.generate.direct import answer as answer
from llava_jax.generate.engine import Engine as Engine
from llava_jax.generate.engine import Full as Full
from llava_jax.generate.generator import Generator as Generator
from llava_jax.generate.job import Job as Job
