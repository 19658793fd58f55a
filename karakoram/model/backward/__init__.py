"""Operations with a backward pass of their own, because autograd's is several times slower on a CPU."""
