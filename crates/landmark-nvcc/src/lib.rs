//! Compiles CUDA kernels with nvcc and links them: what the build scripts of the crates with kernels share.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Machine code for Ampere and Ada, which Hopper's driver would have to translate at every start; for Hopper; and PTX for what
/// comes after.
pub const GENERAL: &[&str] = &[
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
];
/// Hopper's own instructions.
pub const HOPPER: &[&str] = &["-gencode=arch=compute_90a,code=sm_90a"];

/// Called from a build script: compiles `folder/UNIT.cu` for each unit with its architectures into a static library of this name and
/// links it, if the package's feature `cuda` is on. Does nothing without it.
///
/// # Panics
/// nvcc is missing or fails: a build script has no other way to say so.
pub fn compile(library: &str, folder: &str, units: &[(&str, &[&str])]) {
    println!("cargo:rerun-if-changed=build.rs");
    let mut headers = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}")) {
        let path = entry.unwrap_or_else(|error| panic!("{folder}: {error}")).path();
        if path.extension().is_some_and(|extension| ["cu", "cuh", "h"].iter().any(|kernel| extension == *kernel)) {
            println!("cargo:rerun-if-changed={}", path.display());
            if path.extension().is_some_and(|extension| extension != "cu") {
                headers.push(path);
            }
        }
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let home = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(env::var_os).map(PathBuf::from);
    let nvcc = match (env::var_os("NVCC"), &home) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(home)) => home.join("bin/nvcc"),
        (None, None) => PathBuf::from("nvcc"),
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiling: Vec<_> = units
        .iter()
        .map(|(name, architectures)| {
            let source = Path::new(folder).join(name).with_extension("cu");
            let object = out.join(name).with_extension("o");
            let mut command = Command::new(&nvcc);
            command.args(["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-c"]).arg(&source).arg("-o").arg(&object);
            command.args(*architectures);
            let sources = [&headers[..], &[source]].concat();
            (thread::spawn(move || compile_if_older(command, &sources)), object)
        })
        .collect();
    let mut archive = Command::new(&nvcc);
    archive.arg("-lib").arg("-o").arg(out.join(format!("lib{library}.a")));
    for (compiled, object) in compiling {
        compiled.join().expect("nvcc failed, as told above");
        archive.arg(object);
    }
    run(archive);

    println!("cargo:rustc-link-search=native={}", out.display());
    let mut folders: Vec<PathBuf> =
        env::var_os("LIBRARY_PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default();
    // nvcc on the path and no variable set: the toolkit is where nvcc is.
    let home = home.or_else(|| Some(fs::canonicalize(which(&nvcc)?).ok()?.parent()?.parent()?.to_path_buf()));
    if let Some(home) = home {
        folders.extend(["lib64", "targets/x86_64-linux/lib", "lib"].map(|lib| home.join(lib)));
    }
    for folder in folders.iter().filter(|folder| folder.join("libcudart.so").exists()) {
        println!("cargo:rustc-link-search=native={}", folder.display());
    }
    println!("cargo:rustc-link-lib=static={library}");
    for library in ["cudart", "stdc++"] {
        println!("cargo:rustc-link-lib={library}");
    }
}

/// Runs the command, whose last argument but the architectures is the object, unless it was run as it is since its sources changed: a
/// change of one kernel need not compile all.
fn compile_if_older(command: Command, sources: &[PathBuf]) {
    let done =
        command.get_args().skip_while(|arg| *arg != "-o").nth(1).map(|object| Path::new(object).with_extension("done"));
    let done = done.expect("the command has an object");
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let line = format!("{command:?}");
    let newest = sources.iter().map(|source| modified(source)).max().flatten();
    if modified(&done) > newest && fs::read_to_string(&done).is_ok_and(|last| last == line) {
        return;
    }
    // A failure must not leave an older success behind.
    let _ = fs::remove_file(&done);
    run(command);
    fs::write(&done, line).unwrap_or_else(|error| panic!("{}: {error}", done.display()));
}

fn run(mut command: Command) {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "{}: {error}. The feature `cuda` needs CUDA's compiler, 12.4 or newer: set NVCC or CUDA_HOME, or see \
             scripts/cuda-toolchain.sh",
            command.get_program().display()
        )
    });
    if !output.status.success() {
        panic!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
}

fn which(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return Some(program.to_path_buf());
    }
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| path.exists())
}
