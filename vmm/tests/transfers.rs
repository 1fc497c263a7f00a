//! Files carried into a machine and out of it by OpenSSH's `scp` and `sftp`.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant, UNIX_EPOCH},
};

use kage_abi::stream::Stream as Content;
use lab::{Lab, desk::Desk};

fn content(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    Content::new(9).fill(&mut content);
    content
}

#[track_caller]
fn succeed(command: &mut Command) -> Output {
    let output = command.output().expect("OpenSSH is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Runs commands of `sftp`; the first that fails ends it.
#[track_caller]
fn sftp(desk: &Desk<'_>, commands: &str) -> Output {
    let mut client = desk.client("sftp");
    client.args(["-b", "-"]).arg(desk.remote("")).stdin(Stdio::piped());
    client.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = client.spawn().expect("sftp is installed");
    child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn scp_carries_files_and_trees_in_both_directions() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let (file, back) = (lab.dir().join("big"), lab.dir().join("back"));
        let bytes = content(9_000_001);
        fs::write(&file, &bytes).unwrap();
        let started = Instant::now();
        succeed(desk.client("scp").arg(&file).arg(desk.remote("")));
        let there = started.elapsed();
        succeed(desk.client("scp").arg(desk.remote("big")).arg(&back));
        println!("9 MB: {there:?} there, {:?} back", started.elapsed() - there);
        assert!(fs::read(&back).unwrap() == bytes);
        assert!(desk.say("ls").contains("big\n"));

        let tree = lab.dir().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        for (path, bytes) in [("one", &b"1"[..]), ("a/two", b""), ("a/b/three", &bytes[..70_000])] {
            fs::write(tree.join(path), bytes).unwrap();
        }
        let time = UNIX_EPOCH + Duration::from_secs(1_234_567_890);
        fs::File::options().write(true).open(tree.join("one")).unwrap().set_modified(time).unwrap();
        succeed(desk.client("scp").args(["-r", "-p"]).arg(&tree).arg(desk.remote("/tmp/copy")));
        assert_eq!(desk.say("cat /tmp/copy/one"), "1");
        let copy = lab.dir().join("copy");
        succeed(desk.client("scp").args(["-r", "-p"]).arg(desk.remote("/tmp/copy")).arg(lab.dir()));
        assert!(fs::read(copy.join("a/b/three")).unwrap() == bytes[..70_000]);
        assert_eq!(fs::read(copy.join("a/two")).unwrap(), b"");
        assert_eq!(fs::metadata(copy.join("one")).unwrap().modified().unwrap(), time);

        for (from, to) in [("/nowhere", "x"), ("/tmp", "x")] {
            let output = desk.client("scp").arg(desk.remote(from)).arg(lab.dir().join(to)).output().unwrap();
            assert!(!output.status.success(), "{from}");
        }
        let output = desk.client("scp").arg(&file).arg(desk.remote("/nowhere/x")).output().unwrap();
        assert!(!output.status.success());
    });
}

#[test]
fn sftp_lists_makes_renames_and_removes() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let file = lab.dir().join("f");
        fs::write(&file, "text").unwrap();
        let here = |path: &str| lab.dir().join(path).display().to_string();
        let output = sftp(
            &desk,
            &format!(
                "pwd\nmkdir d\nput {} d/f\nrename d/f d/g\nln -s g d/link\nln d/g d/twin\nls -l d\ncd d\nget link {}\n\
                 chmod 600 g\ndf\nls -1\nrm link\nrm twin\nrm g\ncd ..\nrmdir d\n",
                here("f"),
                here("got"),
            ),
        );
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("/home/alice\n"), "{text}");
        assert!(text.contains("lrwxrwxrwx") && text.contains(" g\n"), "{text}");
        assert_eq!(fs::read(lab.dir().join("got")).unwrap(), b"text");
        assert_eq!(desk.say("ls"), "");
        for commands in ["rm nothing\n", "mkdir /tmp\n", "rmdir /\n", "cd /etc/motd\n", "get /tmp x\n"] {
            assert!(!sftp(&desk, commands).status.success(), "{commands}");
        }
        desk.say("echo a > a; echo b > b");
        let output = sftp(&desk, "rename a b\n");
        assert!(output.status.success(), "OpenSSH asks for a rename that replaces");
        assert_eq!(desk.say("ls; cat b"), "b\na\n");
    });
}

#[test]
fn a_transfer_goes_on_through_moves() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let (file, back) = (lab.dir().join("big"), lab.dir().join("back"));
        let bytes = content(12 << 20);
        fs::write(&file, &bytes).unwrap();
        let mut carry = |from: &Path, to: &str, into: bool| {
            let mut client = desk.client("scp");
            client.args(["-l", "60000"]);
            if into {
                client.arg(from).arg(desk.remote(to));
            } else {
                client.arg(desk.remote(to)).arg(from);
            }
            let mut child = client.spawn().unwrap();
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(250));
                desk.walk();
            }
            assert!(child.wait().unwrap().success());
        };
        carry(&file, "big", true);
        carry(&back, "big", false);
        assert!(fs::read(&back).unwrap() == bytes);
    });
}
