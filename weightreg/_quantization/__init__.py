"""Networks of binary and ternary weights, stored in one or two bits a weight."""
