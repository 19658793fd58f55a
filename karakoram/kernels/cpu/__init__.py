"""The CPU library: C++ behind a C ABI, built on first use."""
