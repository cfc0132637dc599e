//! Mounts that stop to answer in the middle of a transfer.

use envd::proto::filesystem::{
    ArchiveRequest, ArchiveResponse, ExtractRequest, ExtractResponse, ReadRequest, ReadResponse,
    WriteRequest, WriteResponse, extract_request, read_response, write_request,
};

use super::{Env, Failure, Messages, rest_error, soon};
use crate::common::{
    hung_mount::HANGS_AT,
    rpc::{Client, Msg, Wire},
};

/// More than is written before the mount hangs.
const LONG: usize = 16 << 20;
const _: () = assert!(LONG as u64 > HANGS_AT);

fn env() -> Option<Env> {
    let env = Env::new()?;
    env.hung.answer_until_the_middle();
    Some(env)
}

/// Reads a stream to its error; gives what came before it.
async fn until_it_fails<R: Msg>(
    mut messages: Messages<R>,
    length: impl Fn(&R) -> usize,
) -> (usize, Failure) {
    let mut sum = 0;
    loop {
        match messages.next().await {
            Ok(Some(message)) => sum += length(&message),
            Ok(None) => panic!("it ended well after {sum} bytes"),
            Err(failure) => return (sum, failure),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_fails_by_name_in_the_middle() {
    let Some(env) = env() else { return };
    let path = format!("{}/big", env.hung.path());
    let request = ReadRequest { path, ..ReadRequest::default() };
    let call = async {
        let pieces = env.files.client.stream("/filesystem.Filesystem/Read", &request).await;
        let length = |piece: &ReadResponse| match &piece.event {
            Some(read_response::Event::Data(data)) => data.len(),
            _ => 0,
        };
        until_it_fails(pieces.unwrap(), length).await
    };
    let (read, failure) = soon("a read", call).await;
    assert!(read > 0, "it hangs in the middle");
    env.check(&failure, "unavailable");
    env.is_well_elsewhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_fails_by_name_in_the_middle() {
    let Some(env) = env() else { return };
    let request = ArchiveRequest { path: env.files.at("dir"), ..ArchiveRequest::default() };
    let call = async {
        let chunks = env.files.client.stream("/filesystem.Filesystem/Archive", &request).await;
        until_it_fails(chunks.unwrap(), |chunk: &ArchiveResponse| chunk.data.len()).await
    };
    let (read, failure) = soon("an archive", call).await;
    assert!(read > 0, "it hangs in the middle");
    env.check(&failure, "unavailable");
    env.is_well_elsewhere().await;
}

/// The status has been sent, so that the body breaks off; the log names the mount.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_breaks_off_in_the_middle_and_the_log_names_the_mount() {
    let Some(env) = env() else { return };
    let mut answer = env.files.download(&format!("{}/big", env.hung.path())).await;
    assert_eq!(answer.status(), 200);
    let mut read = 0;
    let broken = async {
        loop {
            match answer.chunk().await {
                Ok(Some(chunk)) => read += chunk.len(),
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    };
    assert!(soon("a download", broken).await, "it breaks off");
    assert!(read > 0, "it hangs in the middle");
    let lines = env.files.daemon.wait_for_log("a download is cut short");
    let named = lines.iter().any(|line| line.to_string().contains(&env.named()));
    assert!(named, "{lines:#?}");
    env.is_well_elsewhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extraction_fails_by_name_in_the_middle() {
    let Some(env) = env() else { return };
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(LONG as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, "hung/new", &vec![b'x'; LONG][..]).unwrap();
    let start = extract_request::Start { path: env.files.at("dir"), ..Default::default() };
    let tar = tar.into_inner().unwrap();
    let data = tar.chunks(1 << 20).map(|data| extract_request::Event::Data(data.to_vec().into()));
    let events = std::iter::once(extract_request::Event::Start(start)).chain(data);
    let requests: Vec<_> = events.map(|event| ExtractRequest { event: Some(event) }).collect();
    let grpc = Client::new(&env.files.daemon, Wire::Grpc);
    let call = async {
        let path = "/filesystem.Filesystem/Extract";
        let mut answer: Messages<ExtractResponse> = grpc.streams(path, &requests).await?;
        answer.next().await.map(drop)
    };
    env.check(&soon("an extraction", call).await.unwrap_err(), "unavailable");
    env.is_well_elsewhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_fail_by_name_in_the_middle() {
    let Some(env) = env() else { return };
    let path = format!("{}/new", env.hung.path());
    let start = write_request::Start { path: path.clone(), ..write_request::Start::default() };
    let data = std::iter::repeat_n(vec![b'x'; 1 << 20], LONG >> 20);
    let data = data.map(|data| write_request::Chunk { data: data.into(), offset: None });
    let data = data.map(write_request::Event::Chunk);
    let events = std::iter::once(write_request::Event::Start(start)).chain(data);
    let requests: Vec<_> = events.map(|event| WriteRequest { event: Some(event) }).collect();
    let grpc = Client::new(&env.files.daemon, Wire::Grpc);
    let call = async {
        let mut answer: Messages<WriteResponse> =
            grpc.streams("/filesystem.Filesystem/Write", &requests).await?;
        answer.next().await.map(drop)
    };
    env.check(&soon("a write", call).await.unwrap_err(), "unavailable");

    let Some(env) = self::env() else { return };
    let path = format!("{}/new", env.hung.path());
    let answer = env.files.upload(&path, &[], vec![b'x'; LONG]).await;
    let message = rest_error(answer, 503).await;
    assert!(message.contains(&env.named()), "{message}");
    env.is_well_elsewhere().await;
}
