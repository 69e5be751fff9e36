//! Benchmarks of Ingle; each file under `benches/` is one program. `NOTES.md` says what was predicted and measured.
