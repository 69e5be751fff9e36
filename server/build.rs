//! A build with CUDA finds NVIDIA's libraries beside itself, where `scripts/install` puts them, before the system's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        // The older kind of path, which holds for the libraries of the libraries too: cuBLAS needs a second one.
        println!("cargo::rustc-link-arg-bins=-Wl,--disable-new-dtags,-rpath,$ORIGIN/../lib/ingle");
    }
}
