"""
Operations as methods of both clients: the synchronous one returns results, the asynchronous one awaits them.

An operation is written once, as a generator. The descriptors here make a method of it for each kind of client.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from arriero_client.effects import Operation

if TYPE_CHECKING:
    from arriero_client.client import AsyncClient, Client

P = ParamSpec("P")
T = TypeVar("T")


class operation(Generic[P, T]):  # noqa: N801 it is a decorator
    """A method that returns the result of an operation."""

    def __init__(self, function: Callable[Concatenate[Any, P], Operation[T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: Client, owner: Any = None) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: Any = None) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: Any = None) -> operation[P, T]: ...
    def __get__(self, client: Any, owner: Any = None) -> Any:
        """Return the method of a client."""
        if client is None:
            return self

        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.transport.run(self.function(client, *args, **kwargs))

        return update_wrapper(method, self.function)


class stream(Generic[P, T]):  # noqa: N801 it is a decorator
    """
    A method that returns a generator of the values that an operation emits, which are T.

    Closing the generator ends the operation.
    """

    def __init__(self, function: Callable[Concatenate[Any, P], Operation[type[T]]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: Client, owner: Any = None) -> Callable[P, Generator[T, None, None]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: Any = None) -> Callable[P, AsyncGenerator[T, None]]: ...
    @overload
    def __get__(self, client: None, owner: Any = None) -> stream[P, T]: ...
    def __get__(self, client: Any, owner: Any = None) -> Any:
        """Return the method of a client."""
        if client is None:
            return self

        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.transport.iterate(self.function(client, *args, **kwargs))

        return update_wrapper(method, self.function)
