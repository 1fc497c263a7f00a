//! Makes an image from a directory: its manifest, its programs compiled, its files as they lie there.

use std::{
    borrow::Cow,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    ImageFile,
    base::BaseError,
    compiler::{self, CompileError, MAX_MODULE},
    embedded,
    file::{Body, FileEntry, Node, Program, check_tree},
    manifest::{Manifest, ManifestError},
};

/// Most bytes of all files.
const MAX_FILES: u64 = 96 << 20;

/// Why no image can be made.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A file or directory.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The manifest.
    #[error("{}: {source}", directory.display())]
    Manifest {
        /// Where it lies.
        directory: PathBuf,
        /// The cause.
        source: ManifestError,
    },
    /// A program's module.
    #[error("program {name}: {}: {source}", path.display())]
    Program {
        /// Its name.
        name: String,
        /// The module.
        path: PathBuf,
        /// The cause.
        source: CompileError,
    },
    /// A program that the default image does not have.
    #[error(
        "program {name}: the default image has none of that name; say where it is: wasm = \"{name}.wasm\""
    )]
    Unknown {
        /// Its name.
        name: String,
    },
    /// A path in the manifest that leads elsewhere.
    #[error("image.toml: {path:?} leads out of the image's directory")]
    Outside {
        /// The path.
        path: String,
    },
    /// Programs and files together.
    #[error("{}: {source}", directory.display())]
    Base {
        /// The image's directory.
        directory: PathBuf,
        /// The cause.
        source: BaseError,
    },
    /// Something that is no file, directory or link, or a tree a machine cannot have.
    #[error("{}: {reason}", path.display())]
    Tree {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Makes the image described by `image.toml` in `directory`, with this program's kernel and engine.
///
/// # Errors
/// [`AssembleError`].
pub fn assemble(directory: &Path) -> Result<ImageFile, AssembleError> {
    let path = directory.join("image.toml");
    let text = fs::read_to_string(&path).map_err(|source| AssembleError::File { path, source })?;
    let manifest = Manifest::parse(&text)
        .map_err(|source| AssembleError::Manifest { directory: directory.to_owned(), source })?;
    let programs = manifest.programs.iter().map(|entry| match &entry.wasm {
        Some(wasm) => compile(&entry.name, &inside(directory, wasm)?),
        None => {
            embedded::program(&entry.name).ok_or_else(|| AssembleError::Unknown { name: entry.name.clone() })
        }
    });
    let programs = programs.collect::<Result<Vec<_>, _>>()?;
    let mut files = Vec::new();
    if let Some(root) = &manifest.files {
        let root = inside(directory, root)?;
        collect(&root, "", &mut files, &mut 0)?;
        check_tree(&files).map_err(|reason| AssembleError::Tree { path: root, reason })?;
    }
    let body = Body {
        manifest,
        engine: Cow::Borrowed(embedded::ENGINE),
        kernel: Cow::Borrowed(embedded::KERNEL),
        files,
        programs,
        compiler: Cow::Borrowed(embedded::COMPILER),
    };
    let image = ImageFile::new(body, None);
    image.check_base().map_err(|source| AssembleError::Base { directory: directory.to_owned(), source })?;
    Ok(image)
}

fn inside(directory: &Path, path: &str) -> Result<PathBuf, AssembleError> {
    let steps_out = |part| !matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir);
    if Path::new(path).components().any(steps_out) {
        return Err(AssembleError::Outside { path: path.to_owned() });
    }
    Ok(directory.join(path))
}

fn compile(name: &str, path: &Path) -> Result<Program, AssembleError> {
    let file = |source| AssembleError::File { path: path.to_owned(), source };
    let refused = |source| AssembleError::Program { name: name.to_owned(), path: path.to_owned(), source };
    if fs::metadata(path).map_err(file)?.len() > MAX_MODULE as u64 {
        return Err(refused(CompileError::Refused(format!("too large: more than {} MiB", MAX_MODULE >> 20))));
    }
    let wasm = fs::read(path).map_err(file)?;
    Ok(Program::new(name.to_owned(), compiler::compile(&wasm).map_err(refused)?))
}

/// Adds what lies below a directory, in the order of names, each directory before what it holds.
fn collect(
    directory: &Path,
    prefix: &str,
    files: &mut Vec<FileEntry>,
    bytes: &mut u64,
) -> Result<(), AssembleError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| AssembleError::File { path, source }
    };
    let mut entries = fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
        .map_err(error(directory))?;
    entries.sort();
    for path in entries {
        let tree = |reason| AssembleError::Tree { path: path.clone(), reason };
        let name =
            path.file_name().and_then(|name| name.to_str()).ok_or_else(|| tree("its name is no UTF-8"))?;
        let inner = format!("{prefix}/{name}");
        let facts = fs::symlink_metadata(&path).map_err(error(&path))?;
        *bytes += facts.len();
        if *bytes > MAX_FILES {
            return Err(tree("more than 96 MiB of files"));
        }
        if facts.is_dir() {
            files.push(FileEntry { path: inner.clone(), node: Node::Directory });
            collect(&path, &inner, files, bytes)?;
        } else if facts.is_symlink() {
            let target = fs::read_link(&path).map_err(error(&path))?;
            let target = target.to_str().ok_or_else(|| tree("it leads to no UTF-8"))?.to_owned();
            files.push(FileEntry { path: inner, node: Node::Link(target) });
        } else if facts.is_file() {
            let content = fs::read(&path).map_err(error(&path))?;
            files.push(FileEntry { path: inner, node: Node::File(Cow::Owned(content)) });
        } else {
            return Err(tree("neither file, directory nor link"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
