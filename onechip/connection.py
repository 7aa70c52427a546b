"""A connection to the server that cannot be kept busy by a client that sends or reads nothing."""

from uvicorn.protocols.http.h11_impl import H11Protocol


def patient_protocol(limits):
    """uvicorn's protocol with the limits of a WebLimits on a connection.

    These are the times for the head of a request to be complete and for what is sent to be taken, for both of which
    uvicorn itself waits without end; and how many connections there are. A connection beyond a limit is dropped, and
    its request is cancelled as if the client had left.
    """

    class PatientProtocol(H11Protocol):
        _head_timer = _send_timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # pause_writing as soon as the kernel takes no more
            if len(self.connections) > limits.connections:
                transport.abort()
            self._await_head()

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_head()  # bytes came, but no whole head
            else:
                self._stop_timer("_head_timer")

        def _await_head(self):
            if self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _stop_timer(self, name):
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

        def pause_writing(self):
            super().pause_writing()
            self._send_timer = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            self._stop_timer("_send_timer")

        def connection_lost(self, exc):
            self._stop_timer("_head_timer")
            self._stop_timer("_send_timer")
            super().connection_lost(exc)

    return PatientProtocol
